"""Base models by name: "tiny-sd" is the one inside the package, anything else a path or hub id."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from hyperlora_jax.parallel.sharding import DEFAULT_RULES, Rule
from hyperlora_jax.shipped import base_path
from hyperlora_jax.stable_diffusion.model import StableDiffusion


def load_base(
    source: str,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> StableDiffusion:
    """The base model called `source`; with a mesh its parameters are spread over it by `rules`.

    Raises:
        UserError: see `StableDiffusion.from_pretrained`; or the embedded model is not built yet.
    """
    return StableDiffusion.from_pretrained(base_path(source), dtype, mesh=mesh, rules=rules)


def outline_base(source: str) -> StableDiffusion:
    """The base model called `source` where nothing runs it: UNet and autoencoder by their configs
    alone, `params` are shapes.

    Raises:
        UserError: see `StableDiffusion.outline`.
    """
    return StableDiffusion.outline(base_path(source), ("unet", "vae"))


def image_size(sd: Any) -> int:
    """Pixels per side of a base model's pictures."""
    return int(sd.unet.settings.sample_size[0] * sd.vae.downsampling)
