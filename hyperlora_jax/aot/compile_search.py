"""The largest batch per chip that fits a slice, with the cheapest remat that allows it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hyperlora_jax.aot.ahead_of_time import Workload, compile_for
from hyperlora_jax.array_types import Json
from hyperlora_jax.parallel.topology import Topology


def largest_batch(fits: Callable[[int], bool], limit: int = 1024, start: int = 1) -> int:
    """The largest power of two (or 3/4 of the next one) that fits, 0 if not even 1 does.

    `start`, a power of two, is tried first: the nearer to the answer, the fewer trials.
    """
    best, size = 0, start
    while size <= limit and fits(size):
        best, size = size, size * 2
    if not best:
        size = start // 2
        while size and not fits(size):
            size //= 2
        best = size
    middle = best + best // 2
    if best >= 2 and middle <= limit and fits(middle):
        return middle
    return best


def search(
    workloads: Sequence[Workload],
    topology: Topology,
    *,
    mesh_axes: Mapping[str, int] | None = None,
    limit: int = 256,
    start: int = 1,
    records: Path | None = None,
    report: Callable[[Json], None] = lambda record: None,
) -> Json | None:
    """Compiles each of `workloads` (the same step, cheapest rematerialisation first) at low effort.

    Returns the record of the largest batch that fits (a dearer remat must beat a cheaper one), None
    if none fits at batch 1. `report` is called after every compilation; `start` and `records` are
    those of `largest_batch` and `compile_for`.
    """
    best: Json | None = None
    for workload in workloads:
        tried: dict[int, Json] = {}

        def fits(size: int, workload: Workload = workload, tried: dict[int, Json] = tried) -> bool:
            tried[size] = compile_for(
                workload,
                topology,
                mesh_axes=mesh_axes,
                batch_per_device=size,
                low_effort=True,
                records=records,
            )
            report(tried[size])
            return tried[size]["fits"]

        size = largest_batch(fits, limit, start)
        if size and (best is None or tried[size]["batch_per_chip"] > best["batch_per_chip"]):
            best = tried[size]
    return best
