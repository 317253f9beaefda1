"""Distributions of new parameters: what PyTorch, diffusers and transformers draw.

The rules are ordered, the first whose pattern is found in a leaf's path ("mid_block/.../kernel")
applies. All numbers come from two long draws that are cut into leaves: hundreds of small random
kernels take a minute to compile, two take a second.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperlora_jax.array_types import Array, Params, PRNGKey

_ONES, _ZEROS = ("constant", 1.0), ("constant", 0.0)

Leaves = Mapping[tuple[str, ...], jax.ShapeDtypeStruct]  # parameters by path


def initial_distribution(path: tuple[str, ...], leaves: Leaves) -> tuple[str, float]:
    """("constant", value), ("normal", std) or ("uniform", bound) of a leaf."""
    name = "/".join(path)
    shape = leaves[path].shape
    if path[-1] == "scale":
        return _ONES
    if re.search(r"norm[^/]*/bias$", name):
        return _ZEROS
    if re.search(r"(token|position)_embedding/embedding$", name):
        return "normal", 0.02
    if re.search(r"class_embedding$", name):
        return "normal", shape[-1] ** -0.5
    if re.search(r"patch_embedding/kernel$", name):
        return "normal", 0.02
    if re.search(r"encoder/layers_\d+/.*bias$", name):
        return _ZEROS
    if re.search(r"encoder/layers_\d+/", name):
        return "normal", _clip_std(path, leaves)
    if re.search(r"(text|visual)_projection/kernel$", name):
        return "normal", shape[0] ** -0.5
    kernel = leaves[(*path[:-1], "kernel")].shape
    return "uniform", 1 / math.sqrt(math.prod(kernel[:-1]))


def _clip_std(path: tuple[str, ...], leaves: Leaves) -> float:
    """transformers' CLIP: deeper encoders start with smaller q, k, v and fc2."""
    inside, outside = leaves[path].shape
    num_layers = len({part for leaf in leaves for part in leaf if part.startswith("layers_")})
    depth_factor = (2 * num_layers) ** -0.5
    if path[-2] == "out_proj":
        return inside**-0.5
    if path[-2] == "fc1":
        return (2 * inside) ** -0.5
    return (outside if path[-2] == "fc2" else inside) ** -0.5 * depth_factor


def draw_params(shapes: Params, key: PRNGKey) -> Params:
    """Parameters of these shapes, float32; traceable."""
    leaves: dict[tuple[str, ...], Any] = flatten_dict(shapes)
    return unflatten_dict(_drawn(tuple((path, s.shape) for path, s in leaves.items()), key))


@functools.partial(jax.jit, static_argnums=0, inline=True)  # as a cut is a program of its own
def _drawn(
    shapes: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...], key: PRNGKey
) -> dict[tuple[str, ...], Array]:
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes}
    rules = {path: initial_distribution(path, leaves) for path in leaves}
    out: dict[tuple[str, ...], Array] = {}
    draws = {"normal": jax.random.normal, "uniform": _symmetric_uniform}
    for kind, leaf_key in zip(draws, jax.random.split(key), strict=True):
        paths = [path for path in sorted(leaves) if rules[path][0] == kind]
        sizes = [math.prod(leaves[path].shape) for path in paths]
        numbers = draws[kind](leaf_key, (sum(sizes),))
        start = 0
        for path, size in zip(paths, sizes, strict=True):
            piece = numbers[start : start + size].reshape(leaves[path].shape)
            out[path] = rules[path][1] * piece
            start += size
    for path, (kind, value) in rules.items():
        if kind == "constant":
            out[path] = jnp.full(leaves[path].shape, value, jnp.float32)
    return out


def _symmetric_uniform(key: PRNGKey, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
