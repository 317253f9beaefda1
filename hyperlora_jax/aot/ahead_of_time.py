"""Does a training step fit a TPU slice, and what would it cost? Answered without a TPU.

The real step is compiled by libtpu for the real topology; memory, FLOPs and collectives are read
from typing import Any
from the compiled program. Time is a roofline estimate from them, never a measurement:

    compute  FLOPs / peak          memory  bytes accessed / memory bandwidth
    network  Σ bytes of collectives / bandwidth of the link that their axis uses
    step ≈ max(compute, memory) + network          (no overlap assumed)
"""

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.stages import Lowered, Traced

from hyperlora_jax.aot.hlo_report import collective_bytes
from hyperlora_jax.array_types import Array, ArrayTree, Json, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.parallel.topology import Topology
from hyperlora_jax.train.flop_count import of_jaxpr
from hyperlora_jax.train.optimizer import make_optimizer
from hyperlora_jax.train.state import abstract_state, state_builder, state_shardings
from hyperlora_jax.train.step import Loss, jit_step

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Of the machine itself; libtpu says at length that it cannot find them out.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
READER = 2  # of programs (`hlo_report.py`): records of another one are made again
LOW_EFFORT = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """A training step by its shapes: what `Task` is, without data and without weights.

    Attributes:
      batch: number of examples → {name: ShapeDtypeStruct [b, ...], or a tree of them}.
      remat: which rematerialisation the loss was built with, for the record.
      loss_on: mesh → the loss for that mesh, where kernels are partitioned by hand (splash).
    """

    name: str
    init: Callable[[Array], ArrayTree]
    loss: Loss
    frozen: ArrayTree
    batch: Callable[[int], Params]
    optimizer: Json = field(default_factory=lambda: {"learning_rate": 1e-4})
    ema_decay: float | None = None
    remat: str = "none"
    loss_on: Callable[[Mesh], Loss] | None = None


def prepare_environment() -> None:
    """Sets what libtpu needs to compile without a TPU; before JAX's first use of a backend."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def topology_mesh(topology: Topology, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the slice's devices, which exist only as a description.

    Raises:
      UserError: libtpu is missing or does not know the slice, or the axes do not fit.
    """
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology.description,
            **topology.libtpu_arguments,
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        raise UserError(
            f"--topology {topology.name}: libtpu cannot describe {topology.description} ({reason});"
            ' needs pip install "jax[tpu]"'
        ) from error
    return make_mesh(data, fsdp, tensor, devices=described.devices)


def trace(workload: Workload, mesh: Mesh, batch_per_device: int) -> Traced:
    """The traced training step for `mesh`, from shapes alone."""
    transform, rate = make_optimizer(num_steps=1000, **workload.optimizer)
    build = state_builder(workload.init, transform, with_ema=workload.ema_decay is not None)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(build, key)
    shardings = state_shardings(shapes, mesh)
    frozen = jax.eval_shape(lambda: workload.frozen) if _is_concrete(workload.frozen) else None
    frozen = workload.frozen if frozen is None else frozen
    frozen_places = sharding.param_shardings(frozen, mesh, sharding.REPLICATED_RULES)
    size = batch_per_device * mesh.shape["data"] * mesh.shape["fsdp"]
    batch = workload.batch(size)
    batch = abstract_state(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
    loss = workload.loss if workload.loss_on is None else workload.loss_on(mesh)
    step = jit_step(
        mesh, shardings, frozen_places,
        loss=loss, optimizer=transform, rate=rate, ema_decay=workload.ema_decay,
    )  # fmt: skip
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    placed = abstract_state(frozen, frozen_places)
    return step.trace(abstract_state(shapes, shardings), placed, batch, key)


def _is_concrete(tree: ArrayTree) -> bool:
    return any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(tree))


def does_not_fit(error: Exception) -> bool:
    """Whether the compiler refused the program for lack of device memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error)


def roofline(
    topology: Topology,
    flops: float,
    bytes_accessed: float,
    collectives: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """Seconds by kind per device and their estimate of a step (see the head of this file)."""
    chip, share = topology.chip, topology.chip.devices
    link, network = chip.link_bandwidth / share, chip.network_bandwidth / share
    seconds = 0.0
    for axes in collectives.values():
        for axis, size in axes.items():
            seconds += size / (network if axis == "slices" else link)
    compute = flops / (chip.peak_flops / share)
    memory = bytes_accessed / (chip.memory_bandwidth / share)
    return {
        "compute": compute,
        "memory": memory,
        "network": seconds,
        "step": max(compute, memory) + seconds,
    }


def compile_for(
    workload: Workload,
    topology: Topology,
    *,
    mesh_axes: Mapping[str, int] | None = None,
    batch_per_device: int = 1,
    low_effort: bool = False,
    records: Path | None = None,
) -> dict[str, object]:
    """Compiles the step for the slice; returns one JSON-able record, also when it does not fit.

    `records` is a folder of earlier records: the same program is not compiled twice.

    Raises:
      UserError: the slice or the mesh is impossible, or libtpu is missing.
    """
    axes = dict(mesh_axes or {})
    mesh = topology_mesh(topology, **axes)
    record: dict[str, object] = {
        "workload": workload.name,
        "topology": topology.name,
        "chips": topology.num_chips,
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "batch_per_chip": batch_per_device * topology.chip.devices,
        "remat": workload.remat,
        "effort": "low" if low_effort else "full",
    }
    traced = trace(workload, mesh, batch_per_device)
    lowered = traced.lower(lowering_platforms=("tpu",))
    file = records / f"{_identity(lowered, record)}.json" if records else None
    if file is not None and file.is_file():
        return json.loads(file.read_text())
    flops = of_jaxpr(traced.jaxpr.jaxpr) / mesh.size
    record |= _compile(lowered, topology, mesh, flops, LOW_EFFORT if low_effort else {})
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _identity(lowered: Lowered, record: Json) -> str:
    """sha256 (hex) of the program, of what it is compiled for and of the compiler."""
    compiler = [jax.__version__, importlib.metadata.version("libtpu")]
    facts = json.dumps([compiler, record, READER], sort_keys=True)
    return hashlib.sha256((facts + lowered.as_text()).encode()).hexdigest()


def _compile(lowered: Lowered, topology: Topology, mesh: Mesh, flops: float, options: Json) -> Json:
    """What the compiler says of the program: its figures, or why it does not fit."""
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(options))
    except Exception as error:
        if not does_not_fit(error):
            raise
        message = " ".join(str(error).split())[:400]
        return {
            "fits": False,
            "reason": message,
            "compile_seconds": time.perf_counter() - began,
        }
    seconds = time.perf_counter() - began
    return {"compile_seconds": seconds, **_read(compiled, topology, mesh, flops)}


def _read(compiled: Any, topology: Topology, mesh: Mesh, flops: float) -> Json:
    """Figures of a compiled step, per device; `flops` from its jaxpr (loops in full)."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    arguments = int(memory.argument_size_in_bytes)
    temporaries = int(memory.temp_size_in_bytes)
    new = int(memory.output_size_in_bytes) - int(memory.alias_size_in_bytes)
    peak = arguments + temporaries + max(new, 0)
    limit = int(topology.chip.memory_gib * GIB / topology.chip.devices)
    flops = max(flops, float(cost.get("flops", 0.0)))
    program = compiled.as_text()
    moved = collective_bytes(program, mesh, topology.num_slices)
    seconds = roofline(topology, flops, float(cost.get("bytes accessed", 0.0)), moved)
    return {
        "fits": peak <= limit,
        "bytes": {
            "arguments": arguments, "temporaries": temporaries, "peak": peak, "limit": limit,
        },
        "flops_per_chip": flops * topology.chip.devices,
        "pallas_kernels": program.count('custom_call_target="tpu_custom_call"'),
        "collective_bytes": moved,
        "step_seconds_estimate": seconds["step"],
        "seconds_estimate": seconds,
        "mfu_estimate": seconds["compute"] / seconds["step"] if seconds["step"] else 0.0,
    }  # fmt: skip
