"""Several LoRAs and prompts in one picture, each in its own region, in one pass of the UNet.

A picture has K regions with masks that add up to 1 at every position. What has no picture axes
(timestep, prompt) has K rows for each picture, one per region; everything else has one row, and is
mixed by the masks at its own resolution:

  1. layers over positions     y = x W + Σₖ mₖ (x · downₖ · upₖ)               `layers.lora_linear`
  2. time in a residual block  Σₖ mₖ shiftₖ, with shiftₖ by LoRA k                        `blended`
  3. cross attention           Σₖ mₖ attention(q, K and V of prompt k by LoRA k)          `blended`

Self-attention, group norms and convolutions still see the whole picture: regions know of each
other. Regions that are `apart` do not. A base finds its place by the zeros beyond a picture's edge,
so their convolutions, once for each region, see zeros beyond a region (`within`).
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import struct

from hyperlora_jax.array_types import Array, Float


@struct.dataclass
class Shares:
    """Masks at every resolution of a UNet.

    Attributes:
        by_positions: [b, n, k] by the number n of a resolution's positions.
        apart: whether self-attention, group norms and convolutions stay within regions.
    """

    by_positions: dict[int, Float[Array, "b n k"]]
    apart: bool = struct.field(pytree_node=False, default=False)


def pyramid(masks: Float[Array, "b k h w"], num_levels: int, apart: bool = False) -> Shares:
    """Masks at the resolutions of a UNet's levels: means of 2 × 2 positions."""
    by_positions = {}
    for _ in range(num_levels):
        batch, regions, height, width = masks.shape
        by_positions[height * width] = masks.reshape(batch, regions, -1).swapaxes(1, 2)
        odd = [(0, 0), (0, 0), (0, height % 2), (0, width % 2)]
        even = jnp.pad(masks, odd, mode="edge")
        masks = even.reshape(batch, regions, -(-height // 2), 2, -(-width // 2), 2).mean((3, 5))
    return Shares(by_positions, apart)


def shares_of(regions: Shares | None, positions: Sequence[int]) -> Float[Array, "b ... k"] | None:
    """The masks of a layer over these positions, [b, *positions, k]."""
    if regions is None:
        return None
    shares = regions.by_positions[math.prod(positions)]
    return shares.reshape(shares.shape[0], *positions, shares.shape[-1])


def within(x: Float[Array, "b h w c"], shares: Float[Array, "b h w k"]) -> Float[Array, "bk h w c"]:
    """A row for each region: zeros where it has no share."""
    held = jnp.moveaxis(shares > 0, -1, 1)[..., None]
    return jnp.where(held, x[:, None], 0).reshape(-1, *x.shape[1:])


def joined_ranks(
    down: Float[Array, "bk ... i r"], up: Float[Array, "bk r o"], num_regions: int
) -> tuple[Float[Array, "b ... i kr"], Float[Array, "b kr o"]]:
    """K LoRAs in a row become one whose rank is K times as large, region by region."""
    down = down.reshape(-1, num_regions, *down.shape[1:])
    down = jnp.moveaxis(down, 1, -2)
    return down.reshape(*down.shape[:-2], -1), up.reshape(down.shape[0], -1, up.shape[-1])


def blended(
    rows: Float[Array, "bk ... c"], shares: Float[Array, "b ... k"]
) -> Float[Array, "b ... c"]:
    """Σₖ shareₖ rowₖ of K rows for each picture."""
    rows = rows.reshape(shares.shape[0], -1, *rows.shape[1:])
    return jnp.einsum("bk...c,b...k->b...c", rows, shares.astype(rows.dtype))
