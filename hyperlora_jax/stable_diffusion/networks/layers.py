"""Dense, convolution and norm layers whose names and sums match PyTorch's, with a LoRA each;
residual blocks and resampling layers, which the UNet and the autoencoder share.

A layer looks for the variables "down" and "up" of its own path in the `lora` collection. When they
are there it adds x · down · up without ever forming down · up, so that every example of a batch can
carry another LoRA. L LoRAs serve b examples: example k uses LoRA k // (b / L). With regions
(`lora/region_shares.py`) a layer over positions has K LoRAs for each picture: their factors are
joined along the rank, and the rank activations of region k are multiplied by its share of each
position. Convolutions of regions that are apart are computed once for each region.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hyperlora_jax.array_types import Array, DType, Float
from hyperlora_jax.lora.region_shares import Shares, blended, joined_ranks, shares_of, within
from hyperlora_jax.stable_diffusion.networks.convolutions import (
    TRANSFORMED,
    conv2d,
    product,
    transformed_conv,
)


def _param(module: nn.Module, name: str, shape: tuple[int, ...], fill: float = 0.0) -> Array:
    """A parameter. `initialization` draws it, never the module: Flax's own `param` would trace a
    random key for each, a fifth of the time that a model's first call takes."""
    return module.variable("params", name, jnp.full, shape, fill, jnp.float32).value


def lora_linear(
    x: Float[Array, "b ... i"],
    down: Float[Array, "*l i r"],
    up: Float[Array, "*l r o"],
    shares: Float[Array, "b ... k"] | None = None,
) -> Float[Array, "b ... o"]:
    """x · down · up with one LoRA for all examples, or LoRA k // (b/l) for example k.

    With `shares`, a picture has k LoRAs in a row, each counting by its share of a position.
    """
    if down.ndim == 2:
        return (x @ down) @ up
    if shares is not None:
        down, up = joined_ranks(down, up, shares.shape[-1])
    group_shape(x.shape[0], down.shape[0])
    grouped = x.reshape(down.shape[0], -1, x.shape[-1])
    inner = jnp.einsum("lni,lir->lnr", grouped, down)
    return lora_up(inner.reshape(*x.shape[:-1], -1), up, shares)


def lora_conv(
    x: Float[Array, "b h w i"],
    down: Float[Array, "*l kh kw i r"],
    up: Float[Array, "*l r o"],
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
    shares: Float[Array, "b hh ww k"] | None = None,
) -> Float[Array, "b hh ww o"]:
    """A kh×kw convolution with `down`, then 1×1 with `up`, per example; `shares` as in
    `lora_linear`.

    With a leading axis l, the products with all kh·kw taps are one thin einsum, and the taps are
    shifted and summed afterwards, when only r channels are left: a vmapped convolution would become
    a grouped one, and shifting x first (im2col) would cost kh·kw times its memory.
    """
    if down.ndim == 4:
        return conv2d(x, down, stride, padding) @ up
    if shares is not None:
        down, up = joined_ranks(down, up, shares.shape[-1])
    (batch, height, width, channels), (num_loras, kh, kw, _, rank) = x.shape, down.shape
    group_shape(batch, num_loras)
    taps = down.transpose(0, 3, 1, 2, 4).reshape(num_loras, channels, kh * kw * rank)
    products = jnp.einsum("lni,lik->lnk", x.reshape(num_loras, -1, channels), taps)
    products = products.reshape(batch, height, width, kh * kw * rank)
    products = jnp.pad(products, ((0, 0), *padding, (0, 0)))
    rows = (height + sum(padding[0]) - kh) // stride + 1
    columns = (width + sum(padding[1]) - kw) // stride + 1
    inner = jnp.zeros((batch, rows, columns, rank), x.dtype)
    for tap in range(kh * kw):
        i, j = divmod(tap, kw)
        down_to, right_to = i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1
        part = products[..., tap * rank : (tap + 1) * rank]
        inner = inner + part[:, i:down_to:stride, j:right_to:stride]
    return lora_up(inner, up, shares)


def lora_up(
    inner: Float[Array, "b ... r"],
    up: Float[Array, "l r o"],
    shares: Float[Array, "b ... k"] | None = None,
) -> Float[Array, "b ... o"]:
    """inner · up, LoRA k // (b/l) for example k."""
    if shares is not None:
        rank = inner.shape[-1] // shares.shape[-1]
        inner = inner * jnp.repeat(shares, rank, -1).astype(inner.dtype)
    grouped = inner.reshape(up.shape[0], -1, inner.shape[-1])
    return jnp.einsum("lnr,lro->lno", grouped, up).reshape(*inner.shape[:-1], up.shape[-1])


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Φ(x) by the error function, as PyTorch has it: `jax.nn.gelu` takes the complementary one,
    which costs twice the time on a CPU."""
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def group_shape(batch: int, num_loras: int) -> tuple[int, int]:
    """(L, b / L). Raises ValueError when L does not divide b."""
    if batch % num_loras:
        raise ValueError(f"{num_loras} LoRAs cannot serve a batch of {batch}: not divisible")
    return num_loras, batch // num_loras


class Dense(nn.Module):
    """Linear layer, kernel [in, out], with an optional LoRA."""

    features: int
    use_bias: bool = True
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ... i"], regions: Shares | None = None
    ) -> Float[Array, "b ... o"]:
        """x · kernel + x · down · up + bias."""
        x = x.astype(self.dtype)
        kernel = _param(self, "kernel", (x.shape[-1], self.features))
        y = product(x, kernel.astype(self.dtype))
        if self.has_variable("lora", "down"):
            down, up = self.get_variable("lora", "down"), self.get_variable("lora", "up")
            shares = shares_of(regions, y.shape[1:-1])
            y = y + lora_linear(x, down.astype(self.dtype), up.astype(self.dtype), shares)
        if self.use_bias:
            y = y + _param(self, "bias", (self.features,)).astype(self.dtype)
        return y


class Conv(nn.Module):
    """2-D convolution, kernel [kh, kw, in, out], with an optional LoRA.

    `padding` is ((top, bottom), (left, right)), or an int for all four.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1
    use_bias: bool = True
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], regions: Shares | None = None
    ) -> Float[Array, "b hh ww o"]:
        """Convolution plus its LoRA and bias; with regions apart, each sees zeros beyond itself, as
        beyond a picture's edge."""
        p = self.padding
        padding = ((p, p), (p, p)) if isinstance(p, int) else p
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        x, apart = x.astype(self.dtype), None
        if regions is not None and regions.apart and self.kernel_size > 1:
            x = within(x, shares_of(regions, x.shape[1:-1]))
            apart, regions = regions, None
        if self.has_variable("params", TRANSFORMED):
            kernel = self.get_variable("params", TRANSFORMED)
            y = transformed_conv(x, kernel.astype(self.dtype))
        else:
            kernel = _param(self, "kernel", shape)
            y = conv2d(x, kernel.astype(self.dtype), self.stride, padding)
        if self.has_variable("lora", "down"):
            down, up = self.get_variable("lora", "down"), self.get_variable("lora", "up")
            down, up = down.astype(self.dtype), up.astype(self.dtype)
            shares = shares_of(regions, y.shape[1:-1])
            y = y + lora_conv(x, down, up, self.stride, padding, shares)
        if apart is not None:
            y = blended(y, shares_of(apart, y.shape[1:-1]))
        if self.use_bias:
            y = y + _param(self, "bias", (self.features,)).astype(self.dtype)
        return y


class GroupNorm(nn.Module):
    """Group norm over [b, ..., c] with float32 statistics."""

    num_groups: int
    epsilon: float = 1e-5
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ... c"], regions: Shares | None = None
    ) -> Float[Array, "b ... c"]:
        """Normalises over positions and the channels of a group; over those of each region, where
        they are apart."""
        channels = x.shape[-1]
        scale = _param(self, "scale", (channels,), 1.0).astype(jnp.float32)
        bias = _param(self, "bias", (channels,)).astype(jnp.float32)
        groups = x.astype(jnp.float32).reshape(
            x.shape[0], -1, self.num_groups, channels // self.num_groups
        )
        shares = shares_of(regions, x.shape[1:-1])
        if shares is None or regions is None or not regions.apart:
            centred = groups - _group_mean(groups)
            variance = _group_mean(jnp.square(centred))
            normed = centred * lax.rsqrt(variance + self.epsilon)
        else:
            each = shares.astype(jnp.float32).reshape(*groups.shape[:2], 1, 1, -1)  # [b n 1 1 k]
            weights = each / (each.sum(1, keepdims=True) + 1e-12)
            groups = groups[..., None]
            mean = (groups * weights).sum(1, keepdims=True).mean(3, keepdims=True)
            centred = groups - mean
            variance = (jnp.square(centred) * weights).sum(1, keepdims=True).mean(3, keepdims=True)
            normed = (centred * lax.rsqrt(variance + self.epsilon) * each).sum(-1)
        return (normed.reshape(x.shape) * scale + bias).astype(self.dtype)


def _group_mean(groups: Float[Array, "b n g c"]) -> Float[Array, "b 1 g 1"]:
    """In two steps, which a CPU does in half the time of one."""
    return groups.mean(1, keepdims=True).mean(3, keepdims=True)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with float32 statistics."""

    epsilon: float = 1e-5
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """Normalises every vector."""
        scale = _param(self, "scale", x.shape[-1:], 1.0).astype(jnp.float32)
        bias = _param(self, "bias", x.shape[-1:]).astype(jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


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
