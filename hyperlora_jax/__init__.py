"""hyperlora_jax: hypernetworks that write Stable Diffusion LoRAs in one pass, in JAX/Flax.

    import hyperlora_jax as hl

    sd = hl.load_base("tiny-sd")  # or a diffusers directory
    hyper = hl.Hypernetwork.restore("demo/run")
    loras = hyper.generate(jax.random.key(0), ["anna.jpg"])
    images = sd.sample(jax.random.key(1), "a portrait", lora=loras)
    hl.save_images("pictures", images)
    hyper.save_lora("anna.safetensors", loras)

Names are imported when first used, so that `import hyperlora_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Hypernetwork": "hyperlora_jax.hypernet.hypernetwork",
    "LoraSite": "hyperlora_jax.lora.sites",
    "LoraSpec": "hyperlora_jax.lora.sites",
    "NoiseSchedule": "hyperlora_jax.diffusion.schedule",
    "Region": "hyperlora_jax.stable_diffusion.picture_regions",
    "StableDiffusion": "hyperlora_jax.stable_diffusion.model",
    "UserError": "hyperlora_jax.errors",
    "load_base": "hyperlora_jax.stable_diffusion.embedded",
    "load_lora": "hyperlora_jax.lora_files",
    "read_references": "hyperlora_jax.pictures.references",
    "refine_loras": "hyperlora_jax.refine",
    "save_images": "hyperlora_jax.pictures.pictures",
    "save_lora": "hyperlora_jax.lora_files",
    "save_loras": "hyperlora_jax.lora_files",
    "to_pil": "hyperlora_jax.pictures.pictures",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from hyperlora_jax.diffusion.schedule import NoiseSchedule as NoiseSchedule
    from hyperlora_jax.errors import UserError as UserError
    from hyperlora_jax.hypernet.hypernetwork import Hypernetwork as Hypernetwork
    from hyperlora_jax.lora.sites import LoraSite as LoraSite
    from hyperlora_jax.lora.sites import LoraSpec as LoraSpec
    from hyperlora_jax.lora_files import load_lora as load_lora
    from hyperlora_jax.lora_files import save_lora as save_lora
    from hyperlora_jax.lora_files import save_loras as save_loras
    from hyperlora_jax.pictures.pictures import save_images as save_images
    from hyperlora_jax.pictures.pictures import to_pil as to_pil
    from hyperlora_jax.pictures.references import read_references as read_references
    from hyperlora_jax.refine import refine_loras as refine_loras
    from hyperlora_jax.stable_diffusion.embedded import load_base as load_base
    from hyperlora_jax.stable_diffusion.model import StableDiffusion as StableDiffusion
    from hyperlora_jax.stable_diffusion.picture_regions import Region as Region


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hyperlora_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
