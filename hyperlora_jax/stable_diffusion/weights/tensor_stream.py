"""Tensors of weight files, one in host memory at a time, and their way to the devices.

Files are read, not mapped: pages of a mapped file count as memory of the process, and a model would
be there twice while it is loaded.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from hyperlora_jax.array_types import AnyArray, DType, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.lora_files.base_files import Loader, is_pickled, read_pickle
from hyperlora_jax.parallel.sharding import DEFAULT_RULES, Rule, param_shardings

Place = Callable[[tuple[str, ...], np.ndarray], AnyArray]
Placing = Callable[[Params, DType], Place]  # shapes of a tree and the dtype that it is kept in


def read_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Loader]]:
    """(name, loader) of every tensor of safetensors or PyTorch files.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    for path in files:
        if is_pickled(path):
            yield from read_pickle(path)
            continue
        for name, (dtype, shape, offset) in safetensors_io.read_entries(path).items():
            where = (path, dtype, shape, offset)
            yield name, lambda where=where: _read(*where)


def _read(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            count = file.readinto(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if count != data.nbytes:
        raise UserError(f"{path}: cut off: {count} of {data.nbytes} bytes at {offset}")
    return data.view(dtype).reshape(shape)


def to_devices(
    shapes: Params, dtype: DType, mesh: Mesh | None = None, rules: Sequence[Rule] = DEFAULT_RULES
) -> Place:
    """What puts one array of a tree of `shapes` on its device, or its parts on theirs, as `dtype`.

    With a mesh every process keeps only its devices' parts, by the sharding table `rules`. The
    function returns when the array has arrived: transfers that lag behind the reading would keep
    host memory.
    """
    if mesh is None:
        return lambda _, array: jax.device_put(_cast(array, dtype)).block_until_ready()
    places = flatten_dict(param_shardings(shapes, mesh, rules))

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        cast = _cast(array, dtype)
        parts = jax.make_array_from_callback(cast.shape, places[path], lambda index: cast[index])
        return parts.block_until_ready()

    return place


def to_host(shapes: Params, dtype: DType) -> Place:
    """What keeps arrays in host memory, as `dtype`."""
    del shapes
    return lambda _, array: _cast(array, dtype)


def placing(
    name: str, mesh: Mesh | None, rules: Sequence[Rule], on_host: Collection[str]
) -> Placing:
    """Where the parameters of the component `name` go: see `to_devices` and `to_host`."""
    return to_host if name in on_host else functools.partial(to_devices, mesh=mesh, rules=rules)


def _cast(array: np.ndarray, dtype: DType) -> np.ndarray:
    # C order in the same pass: JAX would copy a transposed view once more.
    return np.asarray(array, dtype, order="C")
