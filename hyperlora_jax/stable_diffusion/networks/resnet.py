"""Residual blocks and resampling layers shared by the UNet and the autoencoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, DType, Float
from hyperlora_jax.lora.region_shares import Shares, blended, shares_of
from hyperlora_jax.stable_diffusion.networks.layers import Conv, Dense, GroupNorm


class ResnetBlock(nn.Module):
    """norm1, SiLU, conv1, + time embedding, norm2, SiLU, conv2, + shortcut."""

    features: int
    num_groups: int
    epsilon: float
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, "bk t"] | None = None,
        regions: Shares | None = None,
    ) -> Float[Array, "b h w f"]:
        """`time` is the embedded timestep; the autoencoder has none."""
        hidden = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm1")(x, regions)
        hidden = Conv(self.features, dtype=self.dtype, name="conv1")(jax.nn.silu(hidden), regions)
        if time is not None:
            shift = Dense(self.features, dtype=self.dtype, name="time_emb_proj")(jax.nn.silu(time))
            shift, shares = shift[:, None, None, :], shares_of(regions, x.shape[1:-1])
            hidden = hidden + (shift if shares is None else blended(shift, shares))
        hidden = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm2")(hidden, regions)
        hidden = Conv(self.features, dtype=self.dtype, name="conv2")(jax.nn.silu(hidden), regions)
        if x.shape[-1] != self.features:
            shortcut = Conv(self.features, 1, padding=0, dtype=self.dtype, name="conv_shortcut")
            x = shortcut(x, regions)
        return x + hidden


class Downsample(nn.Module):
    """3×3 convolution of stride 2. The autoencoder pads below and right only."""

    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], regions: Shares | None = None
    ) -> Float[Array, "b hh ww c"]:
        """Halves height and width."""
        return Conv(x.shape[-1], 3, 2, self.padding, dtype=self.dtype, name="conv")(x, regions)


class Upsample(nn.Module):
    """Nearest neighbour to `size` (default twice the size), then a 3×3 convolution."""

    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        size: tuple[int, int] | None = None,
        regions: Shares | None = None,
    ) -> Float[Array, "b hh ww c"]:
        """`size` is (height, width) of the output."""
        x = nearest_resize(x, size or (2 * x.shape[1], 2 * x.shape[2]))
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x, regions)


def nearest_resize(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b hh ww c"]:
    """Nearest neighbour: output row i shows input row floor(i · h / hh)."""
    b, h, w, c = x.shape
    if size == (2 * h, 2 * w):
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        return doubled.reshape(b, 2 * h, 2 * w, c)
    rows, columns = jnp.arange(size[0]) * h // size[0], jnp.arange(size[1]) * w // size[1]
    return x[:, rows][:, :, columns]
