"""hyperlora_jax: hypernetworks that write Stable Diffusion LoRAs in one pass, in JAX/Flax.

    import hyperlora_jax as hl

    sd = hl.StableDiffusion.from_pretrained(path)
    hyper = hl.Hypernetwork.restore(checkpoint)
    loras = hyper.generate(key, references)
    images = sd.sample(key, prompts, lora=loras)
    hl.save_lora("anna.safetensors", lora, spec, format="kohya")

Names are imported when first used, so that `import hyperlora_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Hypernetwork": "hyperlora_jax.hypernet.model",
    "LoraSite": "hyperlora_jax.lora.sites",
    "LoraSpec": "hyperlora_jax.lora.sites",
    "NoiseSchedule": "hyperlora_jax.diffusion.schedule",
    "StableDiffusion": "hyperlora_jax.stable_diffusion.model",
    "UserError": "hyperlora_jax.errors",
    "load_base": "hyperlora_jax.stable_diffusion.embedded",
    "load_lora": "hyperlora_jax.lora_files",
    "save_lora": "hyperlora_jax.lora_files",
    "save_loras": "hyperlora_jax.lora_files",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from hyperlora_jax.diffusion.schedule import NoiseSchedule as NoiseSchedule
    from hyperlora_jax.errors import UserError as UserError
    from hyperlora_jax.hypernet.model import Hypernetwork as Hypernetwork
    from hyperlora_jax.lora.sites import LoraSite as LoraSite
    from hyperlora_jax.lora.sites import LoraSpec as LoraSpec
    from hyperlora_jax.lora_files import load_lora as load_lora
    from hyperlora_jax.lora_files import save_lora as save_lora
    from hyperlora_jax.lora_files import save_loras as save_loras
    from hyperlora_jax.stable_diffusion.embedded import load_base as load_base
    from hyperlora_jax.stable_diffusion.model import StableDiffusion as StableDiffusion


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hyperlora_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
