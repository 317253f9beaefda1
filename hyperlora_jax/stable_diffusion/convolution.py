"""2-D convolution whose gradients are fast on every platform.

XLA writes the gradient for the input as a convolution whose kernel has its two feature axes
swapped by dimension numbers. TPUs and GPUs take that as it is; XLA:CPU (jaxlib 0.10) leaves it to
a generic loop that is many times slower than its fused convolution. On a CPU the kernel is
therefore swapped as data, and strides become zeros between the gradient's pixels.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hyperlora_jax.array_types import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]


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
        return x @ kernel[0, 0]
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


def _plain(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return _plain(x, kernel, stride, padding)


def _forward(x: Array, kernel: Array, stride: int, padding: Padding):
    return _plain(x, kernel, stride, padding), (x, kernel)


def _backward(stride: int, padding: Padding, residuals, gradient: Array):
    x, kernel = residuals

    def by_transposition(gradient: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: _plain(x, kernel, stride, padding), x)(gradient)[0]

    def by_convolution(gradient: Array, kernel: Array) -> Array:
        return _input_gradient(gradient, kernel, stride, padding, x.shape[1:3])

    for_x = lax.platform_dependent(gradient, kernel, cpu=by_convolution, default=by_transposition)
    for_kernel = jax.linear_transpose(lambda k: _plain(x, k, stride, padding), kernel)(gradient)[0]
    return for_x, for_kernel


_conv.defvjp(_forward, _backward)


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
