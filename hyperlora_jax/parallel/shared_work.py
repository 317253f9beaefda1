"""Independent rows of work (pictures of identities, fits of LoRAs) shared out over processes.

    shared_rows(64, draw)          each of 4 processes calls draw on 16 rows, all get all 64
    of_first(lambda: read(file))   what process 0 found, on every process

Every process runs the same program up to here and goes on with the same arrays, so that all take
the same decisions. Devices are the process's own; only results cross between hosts. In a single
process both are plain calls.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from hyperlora_jax.array_types import AnyArray, Int
from hyperlora_jax.parallel import multihost
from hyperlora_jax.parallel.mesh import make_mesh

MAX_DIMENSIONS = 8
Tree = TypeVar("Tree")


def local_mesh() -> Mesh:
    """All devices of this process, on the axis `data`."""
    return make_mesh(devices=jax.local_devices())


def own_rows(count: int, multiple: int = 1) -> Int[np.ndarray, " m"]:
    """This process's part of `count` rows: a block as long as every other process's and a
    multiple of `multiple`; where they do not come out even, the last row is repeated."""
    length = -(-count // (jax.process_count() * multiple)) * multiple
    first = jax.process_index() * length
    return np.minimum(np.arange(first, first + length), count - 1)


def shared_rows(count: int, make: Callable[[Int[np.ndarray, " m"]], Tree]) -> Tree:
    """`make(own_rows(count))` of all processes together; see `gathered`."""
    return gathered(count, make(own_rows(count)))


def gathered(count: int, own: Tree) -> Tree:
    """All rows of a tree of which every process holds `own_rows`.

    Args:
        count: rows in all, at least 1.
        own: leading axis as long as `own_rows`; numpy or JAX arrays, at most 32 bits a number.

    Returns:
        numpy arrays [count, ...], equal on every process.
    """
    made = jax.device_get(own)
    wide = {str(leaf.dtype) for leaf in jax.tree.leaves(made) if leaf.dtype.itemsize > 4}
    if wide:
        raise ValueError(f"64-bit numbers would be cut to 32 between processes. Got: {wide}")
    if jax.process_count() > 1:
        # The slowest is awaited here, where a missing process is named, not in the collective.
        multihost.barrier("shared_rows", multihost.PATIENCE)
        made = multihost_utils.process_allgather(made, tiled=True)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], made)


def of_first(find: Callable[[], AnyArray | None]) -> np.ndarray | None:
    """The array (float32) that process 0 finds, on every process; None where it finds none."""
    if jax.process_count() == 1:
        result = find()
        return None if result is None else np.asarray(result)
    result = find() if multihost.is_first() else None
    header = np.zeros(1 + MAX_DIMENSIONS, np.int32)
    if result is not None:
        result = np.asarray(result, np.float32)
        header[: 1 + result.ndim] = [1 + result.ndim, *result.shape]
    header = multihost_utils.broadcast_one_to_all(header)
    if not header[0]:
        return None
    shape = tuple(int(size) for size in header[1 : header[0]])
    if result is None:
        result = np.zeros(shape, np.float32)
    return np.asarray(multihost_utils.broadcast_one_to_all(result))
