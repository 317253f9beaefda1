"""Where every array lives: an ordered regex table for parameter trees, one rule for batches.

A table is a sequence of `Rule(pattern, specs)`. A parameter's name is its path joined by "/"; the
first rule whose pattern matches the whole name counts, and there must be one for every parameter.
Its specs are alternatives in order of preference, aligned to the parameter's last dimensions: the
first whose axes divide the dimensions wins, and a parameter that none fits is replicated.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hyperlora_jax.array_types import ArrayTree, Int, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel.mesh import BATCH_AXES

Spec = tuple[str | None, ...]
AnyMesh = Mesh | AbstractMesh


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name matches `pattern` take the first of `specs` that divides them.

    Attributes:
      convolutions: four dimensions are a convolution's kernel, of which one dimension is split.
    """

    pattern: str
    specs: tuple[Spec, ...]
    convolutions: bool = True


IN_OUT: tuple[Spec, ...] = (
    ("fsdp", "tensor"),
    ("tensor", "fsdp"),
    ("fsdp", None),
    (None, "fsdp"),
    (None, "tensor"),
    ("tensor", None),
)
# Attention kernels [in, heads, width of a head] and [heads, width of a head, out], maybe stacked:
# heads over tensor, so that a head is computed in one place.
HEADS_IN: tuple[Spec, ...] = (
    ("fsdp", "tensor", None),
    ("fsdp", None, None),
    (None, "tensor", None),
)
HEADS_OUT: tuple[Spec, ...] = (
    ("tensor", None, "fsdp"),
    (None, None, "fsdp"),
    ("tensor", None, None),
)
DEFAULT_RULES = (
    Rule(r".*attention/(query|key|value)/kernel", HEADS_IN, convolutions=False),
    Rule(r".*attention/out/kernel", HEADS_OUT, convolutions=False),
    Rule(r".*/mlp_out/kernel", (("tensor", "fsdp"), *IN_OUT)),  # sums over what mlp_in has split
    Rule(r"(.*/)?(bias|scale)", ()),  # small, also where blocks are stacked
    Rule(r".*", IN_OUT),
)
REPLICATED_RULES = (Rule(r".*", ()),)


def parameter_name(path: tuple) -> str:
    """The "/"-joined name of a leaf, from a `jax.tree_util` key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rules_of(names: Sequence[str], rules: Sequence[Rule]) -> dict[str, Rule]:
    """The rule of each name; raises on names that no rule matches and lists them."""
    first = {
        name: next((r for r in rules if re.fullmatch(r.pattern, name)), None) for name in names
    }
    uncovered = [name for name, rule in first.items() if rule is None]
    if uncovered:
        raise ValueError(f"sharding rules must match every parameter. Uncovered: {uncovered}")
    return {name: rule for name, rule in first.items() if rule is not None}


def _divides(spec: Spec, shape: tuple[int, ...], mesh: AnyMesh) -> bool:
    if len(spec) > len(shape):
        return False
    tail = shape[len(shape) - len(spec) :]
    return all(a is None or d % mesh.shape[a] == 0 for a, d in zip(spec, tail, strict=True))


def _resolve(rule: Rule, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    for spec in rule.specs:
        # A convolution's kernel [h, w, in, out] is split over in or out, never both: for two such
        # convolutions in a row XLA (jaxlib 0.10) computes wrong gradients.
        used = sum(axis is not None and mesh.shape[axis] > 1 for axis in spec)
        if rule.convolutions and len(shape) >= 4 and used > 1:
            continue
        if _divides(spec, shape, mesh):
            return PartitionSpec(*(None,) * (len(shape) - len(spec)), *spec)
    return PartitionSpec()


def param_shardings(
    shapes: ArrayTree, mesh: AnyMesh, rules: Sequence[Rule] = DEFAULT_RULES
) -> ArrayTree:
    """A NamedSharding for every leaf of `shapes` (arrays or ShapeDtypeStructs), same structure.

    Raises:
      ValueError: parameters that no rule matches.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    rule_of = _rules_of([parameter_name(path) for path, _ in leaves], rules)
    return structure.unflatten(
        NamedSharding(mesh, _resolve(rule_of[parameter_name(path)], tuple(leaf.shape), mesh))
        for path, leaf in leaves
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading axis split over data × fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def spread(count: int, mesh: Mesh) -> NamedSharding | None:
    """A leading axis of so many over as many axes of the mesh as divide it; None where none do."""
    axes: tuple[str, ...] = ()
    for axis in mesh.axis_names:
        if count % (mesh.shape[axis] * math.prod(mesh.shape[a] for a in axes)) == 0:
            axes += (axis,) if mesh.shape[axis] > 1 else ()
    return NamedSharding(mesh, PartitionSpec(axes)) if axes else None


def split_rows(rows: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`rows` [b, ...] split over data × fsdp where these divide b, otherwise as they are."""
    if mesh is None or len(rows) % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return rows
    return jax.device_put(rows, batch_sharding(mesh))


def split_activations(x: jax.Array) -> jax.Array:
    """`x` [b, ...] split over data × fsdp in a program that runs under `knowing(mesh)`; elsewhere
    `x`.

    For activations that begin as a parameter without a batch: XLA lets them follow the parameter,
    whose features fsdp spreads, and then moves the whole batch about between chips.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *[free] * (x.ndim - 1)))


def knowing(mesh: Mesh) -> AbstractContextManager[object]:
    """A context in which a function is traced that `split_activations` shall tell of the mesh."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def on_mesh(model: Any, mesh: Mesh) -> Any:
    """A model (a dataclass with the field `params`) with a copy of them on every device."""
    return dataclasses.replace(model, params=jax.device_put(model.params, replicated(mesh)))


@functools.lru_cache(maxsize=16)
def process_rows(mesh: AnyMesh, batch_size: int) -> dict[int, Int[np.ndarray, " b"]]:
    """The rows of a global batch that each process's devices hold, ascending.

    They need not be neighbours: several slices and split axes of a torus spread a process's devices
    over the batch. Processes may share rows (a tensor axis that spans hosts).

    Raises:
      UserError: the batch is not divisible by data × fsdp.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % shards:
        raise UserError(
            f"batch of {batch_size} examples cannot be split over"
            f" data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} = {shards} devices;"
            f" expected a multiple of {shards}"
        )
    held: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((batch_size,)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(batch_size)))
    return {process: np.asarray(sorted(rows)) for process, rows in held.items()}


def host_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " b"]:
    """The rows of a global batch that this process reads; see `process_rows`."""
    return process_rows(mesh, batch_size)[jax.process_index()]


def put_batch(host_batch: Params, mesh: Mesh) -> Params:
    """Global arrays from this process's rows of the batch (`host_rows`), a tree of arrays; every
    leaf has a leading batch axis.

    Raises:
      UserError: the global batch is not divisible by data × fsdp, or the leaves differ in length.
    """
    leaves = jax.tree.leaves_with_path(dict(host_batch))
    sizes = {parameter_name(path): len(leaf) for path, leaf in leaves}
    if len(set(sizes.values())) > 1:
        raise UserError(f"batch: leading axes differ: {sizes}")
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    held = len(host_rows(mesh, shards))
    global_size = next(iter(sizes.values()), 0) * shards // held
    rows, placed = host_rows(mesh, global_size), batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(host_batch), placed)

    def global_array(leaf: np.ndarray) -> jax.Array:
        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            first, last = np.searchsorted(rows, index[0].indices(global_size)[:2])
            return np.asarray(leaf[first:last])

        return jax.make_array_from_callback((global_size, *leaf.shape[1:]), placed, of_device)

    return jax.tree.map(global_array, dict(host_batch))


def place(tree: ArrayTree, shardings: ArrayTree) -> ArrayTree:
    """`tree`, whole on every host or placed like that, as global arrays; no communication."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def placed(leaf: jax.Array | np.ndarray, where: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == where:
            return leaf
        return jax.make_array_from_callback(
            tuple(leaf.shape), where, lambda index: np.asarray(leaf)[index]
        )

    return jax.tree.map(placed, tree, shardings)


def gather(tree: ArrayTree, mesh: Mesh) -> ArrayTree:
    """Numpy arrays, whole on every host, of a tree that may be spread over hosts."""
    if jax.process_count() > 1:
        tree = jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree)
    return jax.device_get(tree)


def describe(shapes: ArrayTree, shardings: ArrayTree) -> str:
    """The resolved table as text: per distinct placement, how many parameters and of what size."""
    rows: dict[str, list] = {}
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings), strict=True):
        entry = rows.setdefault(str(tuple(sharding.spec)), [0, 0, parameter_name(path)])
        entry[0] += 1
        entry[1] += int(np.prod(leaf.shape))
    lines = [
        f"  {spec:<32} {count:>5} arrays {size:>14,} numbers   e.g. {example}"
        for spec, (count, size, example) in sorted(rows.items())
    ]
    return "\n".join(["placement over mesh axes:", *lines])
