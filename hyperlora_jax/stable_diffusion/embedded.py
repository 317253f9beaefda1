"""Base models by name: "tiny-sd" is the one inside the package, anything else a path or hub id."""

from collections.abc import Collection, Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from hyperlora_jax.array_types import DType
from hyperlora_jax.parallel.sharding import DEFAULT_RULES, REPLICATED_RULES, Rule
from hyperlora_jax.shipped import base_path
from hyperlora_jax.stable_diffusion.model import StableDiffusion

ENCODERS = ("vae", "text_encoder", "text_encoder_2")


def load_base(
    source: str,
    dtype: DType = jnp.float32,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
    on_host: Collection[str] = (),
) -> StableDiffusion:
    """The base model called `source`; with a mesh its parameters are spread over it by `rules`, but
    for those of the components `on_host`, which stay numpy arrays.

    Raises:
        UserError: see `StableDiffusion.from_pretrained`; or the embedded model is not built yet.
    """
    return StableDiffusion.from_pretrained(
        base_path(source), dtype, mesh=mesh, rules=rules, on_host=on_host
    )


def load_frozen(source: str, dtype: DType, mesh: Mesh) -> StableDiffusion:
    """The base model called `source` to train through: its UNet on every device of a mesh; what
    runs over pictures and captions once, before the first step, in host memory.

    Raises:
        UserError: see `load_base`.
    """
    return load_base(source, dtype, mesh, REPLICATED_RULES, ENCODERS)


def outline_base(source: str) -> StableDiffusion:
    """The base model called `source` where nothing runs it: UNet and autoencoder by their configs
    alone, `params` are shapes.

    Raises:
        UserError: see `StableDiffusion.outline`.
    """
    return StableDiffusion.outline(base_path(source), ("unet", "vae"))


def image_size(sd: StableDiffusion) -> int:
    """Pixels per side of a base model's pictures."""
    return int(sd.unet.settings.sample_size[0] * sd.component("vae").downsampling)
