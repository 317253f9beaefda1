"""The largest batch per chip that fits a slice, with the cheapest remat that allows it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyperlora_jax.parallel.topology import Topology
from hyperlora_jax.train.ahead_of_time import Workload, compile_for


def largest_batch(fits: Callable[[int], bool], limit: int = 1024) -> int:
    """The largest power of two (or 3/4 of the next one) that fits, 0 if not even 1 does."""
    best = 0
    size = 1
    while size <= limit and fits(size):
        best, size = size, size * 2
    middle = best + best // 2
    if best >= 2 and middle < size <= limit and fits(middle):
        return middle
    return best


def search(
    workloads: Sequence[Workload],
    topology: Topology,
    *,
    mesh_axes: Mapping[str, int] | None = None,
    limit: int = 256,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any] | None:
    """Compiles each of `workloads` (the same step, cheapest rematerialisation first) at low effort.

    Returns the record of the largest batch that fits (a dearer remat must beat a cheaper one), None
    if none fits at batch 1. `report` is called after every compilation.
    """
    best: dict[str, Any] | None = None
    for workload in workloads:
        records: dict[int, dict[str, Any]] = {}

        def fits(size: int, workload: Workload = workload, records: Any = records) -> bool:
            records[size] = compile_for(
                workload, topology, mesh_axes=mesh_axes, batch_per_device=size, low_effort=True
            )
            report(records[size])
            return records[size]["fits"]

        size = largest_batch(fits, limit)
        if size and (best is None or records[size]["batch_per_chip"] > best["batch_per_chip"]):
            best = records[size]
    return best
