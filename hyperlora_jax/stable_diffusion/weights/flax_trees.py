"""Tensors of diffusers and transformers files to Flax trees and back.

A Flax leaf's path is `module_path` of the PyTorch module plus kernel, scale, embedding or bias.
Reading covers every leaf exactly once: a tensor that no leaf takes, a leaf that no tensor fills and
a shape that does not fit are each an error naming the tensor.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperlora_jax.array_types import AnyArray, Params, PRNGKey
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import module_path, torch_path
from hyperlora_jax.stable_diffusion.weights.initialization import draw_params

# Buffers of old files: nothing that a model computes with.
_BUFFERS = re.compile(r"(^|\.)position_ids$")
# Ordered renamings of historical names to today's, per component.
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "unet": (),
    "vae": (
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
    "text_encoder": ((r"^(?!text_model\.|text_projection\.)", "text_model."),),
}
_RENAMES["image_encoder"] = ((r"^(?!vision_model\.|visual_projection\.)", "vision_model."),)
_RENAMES["text_encoder_2"] = _RENAMES["text_encoder"]


def param_shapes(module: nn.Module) -> Params:
    """Tree of ShapeDtypeStructs of a model's parameters; nothing is computed."""
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *module.dummy_inputs()))["params"]


def init_params(module: nn.Module, key: PRNGKey) -> Params:
    """Parameters of a new model, drawn as PyTorch and transformers draw them. Traceable."""
    return draw_params(param_shapes(module), key)


def today_name(name: str, component: str) -> str | None:
    """Name that current diffusers files use for a tensor; None for a buffer to skip."""
    if _BUFFERS.search(name):
        return None
    for pattern, replacement in _RENAMES.get(component, ()):
        name = re.sub(pattern, replacement, name, count=1)
    return name


def flax_path(name: str, leaves: Mapping[tuple[str, ...], object]) -> tuple[str, ...] | None:
    """Leaf that a tensor of this (current) name fills, or None."""
    module, _, kind = name.rpartition(".")
    path = module_path(module) if module else ()
    kinds = ("kernel", "scale", "embedding") if kind == "weight" else (kind,)
    return next((leaf for k in kinds if (leaf := (*path, k)) in leaves), None)


def torch_to_flax(
    tensors: Iterable[tuple[str, Callable[[], np.ndarray]]],
    shapes: Params,
    component: str,
    source: str,
    place: Callable[[tuple[str, ...], np.ndarray], AnyArray] | None = None,
) -> Params:
    """Flax tree from (tensor name, loader) pairs; tensors are loaded one by one.

    `shapes` is `param_shapes(module)`; `source` names the file in messages; `place` puts an array
    on its device(s) and may change its dtype.

    Raises:
        UserError: for an unknown, doubled or missing tensor or one of the wrong shape.
    """
    leaves: dict[tuple[str, ...], Any] = flatten_dict(shapes)
    arrays: dict[tuple[str, ...], AnyArray] = {}
    for name, load in tensors:
        today = today_name(name, component)
        if today is None:
            continue
        path = flax_path(today, leaves)
        if path is None:
            raise UserError(
                f"{source}: tensor {name!r} is unknown to the {component} of its config"
            )
        if path in arrays:
            raise UserError(f"{source}: tensor {name!r} fills {'/'.join(path)} a second time")
        array = to_flax_layout(load(), path[-1], leaves[path].shape)
        if array.shape != leaves[path].shape:
            raise UserError(
                f"{source}: tensor {name!r} has Flax shape {array.shape}, expected "
                f"{leaves[path].shape}"
            )
        arrays[path] = place(path, array) if place else jnp.asarray(array)
    if missing := sorted(set(leaves) - set(arrays)):
        raise UserError(
            f"{source}: {len(missing)} tensors are missing, first {tensor_name(missing[0])!r}"
        )
    return unflatten_dict(arrays)


def to_flax_layout(array: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """OIHW to HWIO, [out, in] to [in, out]; 1×1 convolutions become linear where asked for."""
    if kind != "kernel":
        return array
    if array.ndim == 4 and len(shape) == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    elif array.ndim == 2 and len(shape) == 4:
        array = array[:, :, None, None]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def tensor_name(path: tuple[str, ...]) -> str:
    """PyTorch name of a Flax leaf."""
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(path[-1], path[-1])
    return f"{torch_path(path[:-1])}.{leaf}" if len(path) > 1 else leaf


def flax_to_torch(params: Params) -> dict[str, np.ndarray]:
    """{tensor name: contiguous array in PyTorch's layout}, in name order."""
    tensors = {}
    for path, value in flatten_dict(params).items():
        array = np.asarray(value)
        if path[-1] == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        tensors[tensor_name(path)] = np.ascontiguousarray(array)
    return dict(sorted(tensors.items()))
