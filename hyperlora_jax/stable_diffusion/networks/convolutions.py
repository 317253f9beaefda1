"""Convolutions and products with a frozen or trained kernel whose gradients are fast everywhere.

XLA writes a convolution's gradient for the input as a convolution whose kernel has its two feature
axes swapped by dimension numbers. TPUs and GPUs take that as it is; XLA:CPU (jaxlib 0.10) leaves it
to a generic loop that is many times slower than its fused convolution. On a CPU the kernel is
therefore swapped as data, and strides become zeros between the gradient's pixels.

A frozen kernel can be `transformed` once, for 3×3 convolutions with 4/9 of the multiplications: by
Winograd's F(2×2, 3×3), which makes tiles of 2×2 pixels of tiles of 4×4 by matrices B, G and A
(A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015):

    (1) Y = Aᵀ [(G g Gᵀ) · (Bᵀ d B)] A

G g Gᵀ takes 16/9 of the kernel's memory; between the transforms there are sixteen products.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from hyperlora_jax.array_types import Array, Float, Params

TRANSFORMED = "transformed_kernel"  # the leaf that stands for "kernel" in a frozen tree
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


def _by_columns(x: Array, kernel: Float[Array, "*k i o"]) -> Array:
    """x · kernelᵀ; the barriers keep XLA from turning it back."""
    turned = lax.optimization_barrier(x.reshape(*kernel.shape[:-2], -1, x.shape[-1]).mT)
    return lax.optimization_barrier(kernel @ turned).mT.reshape(*x.shape[:-1], -1)


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


_G = np.array([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]], np.float32)
_TURNED = (3, 1, 2, 0)  # rows of G g for a g that is turned round


@jax.jit
def transformed(kernel: Float[Array, "3 3 i o"]) -> Float[Array, "4 4 i o"]:
    """G g Gᵀ."""
    out = jnp.matmul(np.kron(_G, _G), kernel.reshape(9, -1), precision="highest")
    return out.reshape(4, 4, *kernel.shape[2:])


@jax.custom_vjp
def transformed_conv(
    x: Float[Array, "b h w i"], kernel: Float[Array, "4 4 i o"]
) -> Float[Array, "b h w o"]:
    """3×3, one pixel of zeros around; the kernel is `transformed` and has no gradient."""
    return _by_tiles(x, kernel, (0, 1, 2, 3), jnp.matmul)


def _transformed_backward(kernel: Array, gradient: Array) -> tuple[Array, None]:
    return _by_tiles(gradient, kernel, _TURNED, _by_columns), None


transformed_conv.defvjp(
    lambda x, kernel: (transformed_conv(x, kernel), kernel), _transformed_backward
)


def _by_tiles(x: Array, kernel: Array, order: Sequence[int], multiply: Any) -> Array:
    """(1), with the rows and columns of the kernel in another order."""
    batch, height, width, _ = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    edges = (1, 2 * rows + 1 - height), (1, 2 * columns + 1 - width)
    x = jnp.pad(x, ((0, 0), *edges, (0, 0)))
    lines = [_inward(line, 2, columns) for line in _inward(x, 1, rows)]
    tiles = jnp.stack([lines[i][j] for i in order for j in order])
    tiles = tiles.reshape(4, 4, batch * rows * columns, -1)
    products = multiply(tiles, kernel).reshape(4, 4, batch, rows, columns, -1)
    sums = [_outward(*(products[i, j] for j in order)) for i in order]
    pixels = [_outward(*column) for column in zip(*sums, strict=True)]
    out = jnp.stack([jnp.stack(line, 3) for line in zip(*pixels, strict=True)], 2)
    return out.reshape(batch, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _inward(x: Array, axis: int, count: int) -> tuple[Array, ...]:
    """Bᵀ d along an axis, of `count` tiles that begin every two pixels."""
    end = 2 * count - 1
    a, b, c, d = (lax.slice_in_dim(x, k, k + end, 2, axis) for k in range(4))
    return a - c, b + c, c - b, b - d


def _outward(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    """Aᵀ m."""
    return a + b + c, b - c - d


def frozen(params: Params, fewest: int = 128) -> Params:
    """A frozen UNet's parameters, with transformed kernels where a CPU gains by them: in 3×3 layers
    of `fewest` channels and more. The coarsest level keeps its kernels: its pixels are few, and its
    kernels most of the memory. So do kernels that are not float32 or not whole on every device."""
    last = max((name for name in params if name.startswith("down_blocks_")), default="")
    coarsest = (last, "mid_block", "up_blocks_0")

    def walk(tree: Params, path: tuple[str, ...]) -> Params:
        out = {}
        for name, value in tree.items():
            here = (*path, name)
            if isinstance(value, Mapping):
                out[name] = walk(value, here)
            elif name == "kernel" and gains(here, value):
                out[TRANSFORMED] = transformed(value)
            else:
                out[name] = value
        return out

    def gains(path: tuple[str, ...], kernel: Any) -> bool:
        if "downsamplers_0" in path or (path[0] in coarsest and "upsamplers_0" not in path):
            return False
        fits = kernel.shape[:2] == (3, 3) and min(kernel.shape[2:]) >= fewest
        return fits and kernel.dtype == jnp.float32 and _on_cpus(kernel)

    return walk(params, ())


def _on_cpus(array: Any) -> bool:
    """Numbers that are whole on each of their devices, which are CPUs."""
    return (
        isinstance(array, jax.Array)
        and not isinstance(array, Tracer)
        and array.is_fully_replicated
        and all(device.platform == "cpu" for device in array.devices())
    )
