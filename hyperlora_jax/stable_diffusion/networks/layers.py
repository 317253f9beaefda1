"""Dense, convolution and norm layers whose names and sums match PyTorch's, with a LoRA each.

A layer looks for the variables "down" and "up" of its own path in the `lora` collection. When they
are there it adds x · down · up without ever forming down · up, so that every example of a batch can
carry another LoRA. L LoRAs serve b examples: example k uses LoRA k // (b / L). With regions
(`lora/region_shares.py`) a layer over positions has K LoRAs for each picture: their factors are
joined along the rank, and the rank activations of region k are multiplied by its share of each
position.

The gradients of a convolution are fast on every platform. XLA writes the gradient for the input as
a convolution whose kernel has its two feature axes swapped by dimension numbers. TPUs and GPUs take
that as it is; XLA:CPU (jaxlib 0.10) leaves it to a generic loop that is many times slower than its
fused convolution. On a CPU the kernel is therefore swapped as data, and strides become zeros
between the gradient's pixels.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hyperlora_jax.array_types import Array, DType, Float
from hyperlora_jax.lora.region_shares import Shares, joined_ranks, shares_of

Padding = tuple[tuple[int, int], tuple[int, int]]
_FEW_ROWS, _FEW_PIXELS = 512, 64  # measured on two cores
_LARGE = 2**20  # numbers of a kernel


def conv2d(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    stride: int,
    padding: Padding,
) -> Float[Array, "b hh ww o"]:
    """Convolution in NHWC with an HWIO kernel; 1×1 at stride 1 is one matrix product.

    Args:
        padding: ((top, bottom), (left, right)) pixels.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1 and not any(map(any, padding)):
        return product(x, kernel[0, 0])
    return _conv(x, kernel, stride, tuple(map(tuple, padding)))


def flax_conv2d(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw group_i o"],
    strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b hh ww o"]:
    """`conv2d` as the `conv_general_dilated` argument of `flax.linen.Conv`.

    Raises:
        ValueError: unequal strides, dilation or groups, which `conv2d` does not know.
    """
    stride, other = strides
    dilated = any(d != 1 for name in ("lhs_dilation", "rhs_dilation") for d in options[name])
    if stride != other or dilated or options["feature_group_count"] != 1:
        raise ValueError(f"expected one stride, no dilation, one group. Got: {strides=} {options=}")
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        padding = [(int(low), int(high)) for low, high in pads]
    return conv2d(x, kernel, stride, (tuple(padding[0]), tuple(padding[1])))


def product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """x · kernel. On a CPU the gradient for a few rows is computed as (kernel · gᵀ)ᵀ: XLA's own
    g · kernelᵀ walks through a large kernel against its order, three to seven times as long."""
    rows = math.prod(x.shape[:-1])
    return _product(x, kernel) if rows <= _FEW_ROWS and kernel.size >= _LARGE else x @ kernel


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _by_columns(x: Array, kernel: Array) -> Array:
    """x · kernelᵀ; the barriers keep XLA from turning it back."""
    turned = lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    return lax.optimization_barrier(kernel @ turned).T.reshape(*x.shape[:-1], -1)


def _product_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    for_x = lax.platform_dependent(
        gradient, kernel, cpu=_by_columns, default=lambda gradient, kernel: gradient @ kernel.T
    )
    flat, rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return for_x, flat.T @ rows


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


def _plain(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    if not _few_pixels(x, kernel, stride):
        return _plain(x, kernel, stride, padding)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _one_product(x, kernel, padding),
        default=lambda x, kernel: _plain(x, kernel, 1, padding),
    )


def _forward(x: Array, kernel: Array, stride: int, padding: Padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride: int, padding: Padding, residuals, gradient: Array):
    x, kernel = residuals

    def by_transposition(gradient: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: _plain(x, kernel, stride, padding), x)(gradient)[0]

    def by_convolution(gradient: Array, kernel: Array) -> Array:
        if _few_pixels(x, kernel, stride):
            return _one_product_back(gradient, kernel, padding, x.shape[1:3])
        return _input_gradient(gradient, kernel, stride, padding, x.shape[1:3])

    for_x = lax.platform_dependent(gradient, kernel, cpu=by_convolution, default=by_transposition)
    for_kernel = jax.linear_transpose(lambda k: _plain(x, k, stride, padding), kernel)(gradient)[0]
    return for_x, for_kernel


_conv.defvjp(_forward, _backward)


def _few_pixels(x: Array, kernel: Array, stride: int) -> bool:
    """Where reading the kernel once, in its order, is what counts on a CPU."""
    return stride == 1 and math.prod(x.shape[:3]) <= _FEW_PIXELS and kernel.size >= _LARGE


def _one_product(x: Array, kernel: Array, padding: Padding) -> Array:
    """The convolution as one product with all windows, [b · hh · ww, kh · kw · i]."""
    kh, kw, _, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    taps = [x[:, i : i + rows, j : j + columns] for i in range(kh) for j in range(kw)]
    return jnp.concatenate(taps, -1) @ kernel.reshape(-1, features)


def _one_product_back(
    gradient: Array, kernel: Array, padding: Padding, size: tuple[int, ...]
) -> Array:
    """Its gradient for x: one product, and its parts shifted and summed."""
    kh, kw, channels, features = kernel.shape
    batch, rows, columns, _ = gradient.shape
    windows = _by_columns(gradient, kernel.reshape(-1, features))
    windows = windows.reshape(batch, rows, columns, kh, kw, channels)
    padded = jnp.zeros((batch, rows + kh - 1, columns + kw - 1, channels), gradient.dtype)
    for i in range(kh):
        for j in range(kw):
            edges = ((0, 0), (i, kh - 1 - i), (j, kw - 1 - j), (0, 0))
            padded = padded + jnp.pad(windows[:, :, :, i, j], edges)
    (top, _), (left, _) = padding
    return padded[:, top : top + size[0], left : left + size[1]]


def _input_gradient(
    gradient: Array, kernel: Array, stride: int, padding: Padding, size: tuple[int, ...]
) -> Array:
    """The transposed convolution, as a plain one with the kernel turned by 180°."""
    edges = []
    for axis in (0, 1):
        before = kernel.shape[axis] - 1 - padding[axis][0]
        spread = (gradient.shape[1 + axis] - 1) * stride + 1
        edges.append((before, size[axis] + kernel.shape[axis] - 1 - spread - before))
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    if stride == 1:
        return _plain(gradient, turned, 1, (edges[0], edges[1]))
    zero = jnp.zeros((), gradient.dtype)
    between = [(0, 0, 0), *((*edge, stride - 1) for edge in edges), (0, 0, 0)]
    return _plain(lax.pad(gradient, zero, between), turned, 1, ((0, 0), (0, 0)))


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
        """Convolution plus its LoRA and bias."""
        p = self.padding
        padding = ((p, p), (p, p)) if isinstance(p, int) else p
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        x = x.astype(self.dtype)
        kernel = _param(self, "kernel", shape)
        y = conv2d(x, kernel.astype(self.dtype), self.stride, padding)
        if self.has_variable("lora", "down"):
            down, up = self.get_variable("lora", "down"), self.get_variable("lora", "up")
            down, up = down.astype(self.dtype), up.astype(self.dtype)
            shares = shares_of(regions, y.shape[1:-1])
            y = y + lora_conv(x, down, up, self.stride, padding, shares)
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
            mean = groups.mean((1, 3), keepdims=True)
            centred = groups - mean
            variance = jnp.square(centred).mean((1, 3), keepdims=True)
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
