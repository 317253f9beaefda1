"""Everything that a UNet is told about a prompt, in one array of rows, as training keeps it.

SD 1.x and 2.x take text states [n, e]. SDXL takes a pooled state [p] and six numbers about the
picture besides (its added conditions): they stand, filled up with zeros, in further rows behind the
states. So a caption is one array everywhere, whatever the family: cached, drawn, dropped.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Array, Float, Int, Params
from hyperlora_jax.stable_diffusion.unet import UNet
from hyperlora_jax.stable_diffusion.unet_config import UNetConfig

NUM_SIZES = 6  # height and width of the original, top and left of the crop, height and width of it


def encode(sd: Any, prompts: Sequence[str], picture: tuple[int, int]) -> Array:
    """Packed text [b, n + extra_rows, e] of the prompts.

    Args:
        sd: a StableDiffusion.
        picture: (height, width) in pixels of the pictures, taken as whole and uncropped.
    """
    text = sd.encode_conditions(prompts)
    if text.pooled is None:
        return text.states
    return _pack(text.states.astype(jnp.float32), text.pooled, picture)


def encode_nothing(sd: Any, picture: tuple[int, int]) -> Array:
    """Packed text [1, …] of no prompt, as sampling with guidance takes it: the empty prompt, or
    zeros where an SDXL model says so (`force_zeros_for_empty_prompt`)."""
    if not (sd.is_xl and sd.zeros_for_no_prompt()):
        return encode(sd, [""], picture)
    zeros = jax.tree.map(jnp.zeros_like, sd.encode_conditions([""]))
    return _pack(zeros.states.astype(jnp.float32), zeros.pooled, picture)


def extra_rows(settings: UNetConfig) -> int:
    """Rows behind the text states: 0 for SD 1.x and 2.x."""
    if settings.addition_time_width is None:
        return 0
    return math.ceil((_pooled_width(settings) + NUM_SIZES) / settings.context_width)


def apply_unet(
    unet: UNet,
    variables: Params,
    latents: Float[AnyArray, "b h w z"],
    timesteps: Int[AnyArray, " b"],
    packed: Float[AnyArray, "b n e"],
) -> Float[Array, "b h w z"]:
    """The UNet's prediction under packed text."""
    settings, added = unet.settings, None
    if rows := extra_rows(settings):
        pooled = _pooled_width(settings)
        tail = packed[:, -rows:].reshape(len(packed), -1)
        packed = packed[:, :-rows]
        sizes = tail[:, pooled : pooled + NUM_SIZES]
        added = {"text_embeds": tail[:, :pooled], "time_ids": sizes}
    return unet.apply(variables, latents, timesteps, packed, added)


def _pooled_width(settings: UNetConfig) -> int:
    assert settings.addition_input_width and settings.addition_time_width
    return settings.addition_input_width - NUM_SIZES * settings.addition_time_width


def _pack(states: Array, pooled: Array, picture: tuple[int, int]) -> Array:
    batch, _, width = states.shape
    sizes = np.asarray([*picture, 0, 0, *picture], np.float32)
    tail = jnp.concatenate(
        [pooled.astype(jnp.float32), jnp.broadcast_to(sizes, (batch, NUM_SIZES))], axis=1
    )
    rows = math.ceil(tail.shape[1] / width)
    tail = jnp.pad(tail, ((0, 0), (0, rows * width - tail.shape[1])))
    return jnp.concatenate([states, tail.reshape(batch, rows, width)], axis=1)
