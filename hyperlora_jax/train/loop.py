"""The training loop. Read this file first: everything else in the package serves one line of it."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from hyperlora_jax.array_types import Array, ArrayTree
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.train.checkpoints import Checkpoints, check_facts, read_meta
from hyperlora_jax.train.metrics import MetricsLog, Progress, Throughput
from hyperlora_jax.train.optimizer import make_optimizer
from hyperlora_jax.train.preemption import Preempted, PreemptionGuard
from hyperlora_jax.train.state import TrainState, abstract_state, state_builder, state_shardings
from hyperlora_jax.train.step import Loss, jit_step

log = logging.getLogger(__name__)


class Batches(Protocol):
    """An endless iterator over this process's part of each batch, whose position can be kept.

    A batch is {name: array [b, ...]}. "record_id" (strings or integers) stays on the host and is
    named when a loss is not finite. The state is JSON, the same on every host (Grain's is).
    """

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...
    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any:
        """The position after the last batch given out."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` gave."""
        ...


@dataclass(frozen=True)
class Task:
    """What to train.

    Attributes:
      name: shown with the progress.
      init: key → trainable parameters; pure, traced under jit.
      loss: (params, frozen, batch, key) → (losses [b], {metric: [b]}); pure.
      frozen: arrays that the loss reads and nobody trains: never donated, never checkpointed.
      batches: where batches come from, at its start; the loop moves it to the saved position.
      facts: JSON-able identity of the run (spec fingerprint, base hash), compared on restore.
      rules, frozen_rules: sharding tables of both trees (`parallel/sharding.py`).
    """

    name: str
    init: Callable[[Array], ArrayTree]
    loss: Loss
    frozen: ArrayTree
    batches: Any
    facts: Mapping[str, Any] = field(default_factory=dict)
    rules: Sequence[sharding.Rule] = sharding.DEFAULT_RULES
    frozen_rules: Sequence[sharding.Rule] = sharding.REPLICATED_RULES


class TrainingDiverged(Exception):
    """The loss or its gradient is not finite. The last checkpoint is from before."""


@dataclass
class _Pending:
    """A dispatched step whose metrics are still on the device."""

    step: int
    metrics: Mapping[str, Array]
    record_ids: Any


def open_workdir(workdir: epath.PathLike) -> epath.Path:
    """Creates the folder and proves that it can be written.

    Raises:
      UserError: it cannot.
    """
    path = epath.Path(workdir)
    probe = path / f".writable-{jax.process_index()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir {path}: cannot write there ({error.strerror or error});"
            " expected a folder that can be created and written"
        ) from error
    return path


def fit(
    task: Task,
    *,
    workdir: epath.PathLike,
    num_steps: int,
    optimizer: Mapping[str, Any],
    mesh: Mesh | None = None,
    seed: int = 0,
    log_every_steps: int = 10,
    checkpoint_every_steps: int = 1000,
    ema_decay: float | None = None,
    keep: int = 2,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TrainState:
    """Trains `task` up to `num_steps`, from the newest checkpoint in `workdir` if there is one.

    `optimizer` are the keyword arguments of `make_optimizer` without num_steps; `config` is the
    resolved config, kept beside the checkpoints. A finished workdir gives its state at once.

    Raises:
      UserError: unusable workdir, checkpoint of other facts, indivisible batch, data that ends.
      TrainingDiverged: a loss or gradient that is not finite.
      Preempted: SIGTERM came; the step is saved.
    """
    # ---- Workdir, mesh, optimiser
    workdir = open_workdir(workdir)
    mesh = make_mesh() if mesh is None else mesh
    transform, rate = make_optimizer(num_steps=num_steps, **optimizer)
    key = jax.device_put(jax.random.key(seed), sharding.replicated(mesh))

    # ---- Shapes and shardings, before any array exists
    build = state_builder(task.init, transform, with_ema=ema_decay is not None)
    shapes = jax.eval_shape(build, key)
    shardings = state_shardings(shapes, mesh, transform, task.rules)
    meta = {"facts": dict(task.facts), "config": dict(config or {}), "seed": seed}

    # ---- State: the newest whole checkpoint, or a new one
    checkpoints = Checkpoints(workdir, keep=keep)
    start_step = checkpoints.latest_step
    if start_step is None:
        state, start_step = jax.jit(build, out_shardings=shardings)(key), 0
    else:
        where = str(checkpoints.directory / str(start_step))
        check_facts(read_meta(checkpoints.directory, start_step)["facts"], meta["facts"], where)
        state, position = checkpoints.restore(start_step, abstract_state(shapes, shardings))
        log.info("%s: restored step %d", task.name, start_step)
        if start_step >= num_steps:
            checkpoints.close()
            return state
        task.batches.set_state(position)

    # ---- Frozen base, placed once; the jitted step
    frozen_places = sharding.param_shardings(task.frozen, mesh, task.frozen_rules)
    frozen = jax.device_put(task.frozen, frozen_places)
    step_fn = jit_step(
        mesh, shardings, frozen_places,
        loss=task.loss, optimizer=transform, rate=rate, ema_decay=ema_decay,
    )  # fmt: skip

    # ---- Logs, then the steps
    primary = jax.process_index() == 0
    if primary:
        (workdir / "config.json").write_text(json.dumps(meta, indent=1))
    report = _Report(task, workdir, start_step, num_steps, log_every_steps, primary, progress)
    try:
        with PreemptionGuard() as guard:
            return _run_steps(
                task, state, frozen, key, mesh, step_fn, checkpoints, meta, guard, report,
                range(start_step, num_steps), checkpoint_every_steps,
            )  # fmt: skip
    finally:
        report.close()
        checkpoints.close()


def _next_batch(task: Task, step: int, mesh: Mesh) -> tuple[dict[str, Array], Any, int]:
    """(global batch, record ids, number of examples read by this process)."""
    try:
        batch = dict(next(task.batches))
    except StopIteration:
        raise UserError(
            f"{task.name}: the data ended before step {step}; expected an iterator that repeats"
        ) from None
    record_ids = batch.pop("record_id", None)
    size = len(next(iter(batch.values())))
    return sharding.put_batch(batch, mesh), record_ids, size


def _run_steps(
    task: Task,
    state: TrainState,
    frozen: ArrayTree,
    key: Array,
    mesh: Mesh,
    step_fn: Any,
    checkpoints: Checkpoints,
    meta: Mapping[str, Any],
    guard: PreemptionGuard,
    report: "_Report",
    steps: range,
    checkpoint_every_steps: int,
) -> TrainState:
    """The loop itself: while the device computes step N, the host reads batch N + 1."""
    pending: _Pending | None = None
    for step in steps:
        waited = time.perf_counter()
        batch, record_ids, size = _next_batch(task, step + 1, mesh)
        report.throughput.add(size * jax.process_count(), time.perf_counter() - waited)
        if step == steps.start:
            report.progress.say("compiling train step…")
        state, metrics = step_fn(state, frozen, batch, key)
        if step == steps.start:
            jax.block_until_ready(metrics)
            report.progress.say("")
            report.throughput.reset()
        # Metrics of the step before are fetched only now, with this one already dispatched.
        report.finish(pending)
        pending = _Pending(step + 1, metrics, record_ids)
        report.progress.advance()
        preempted = guard.reached(step + 1)
        last = step + 1 == steps.stop
        if preempted or last or (step + 1) % checkpoint_every_steps == 0:
            report.finish(pending)  # nothing that is not finite is ever saved
            pending = None
            checkpoints.save(step + 1, state, task.batches.get_state(), meta)
        if preempted and not last:
            checkpoints.wait()
            raise Preempted(step + 1, str(checkpoints.directory.parent))
    checkpoints.wait()
    return state


class _Report:
    """Everything the loop shows and writes; on other processes than the first only the checks."""

    def __init__(
        self,
        task: Task,
        workdir: epath.Path,
        start_step: int,
        num_steps: int,
        every_steps: int,
        primary: bool,
        progress: bool,
    ):
        self._every, self._last = every_steps, num_steps
        self._name = task.name
        self._finished = start_step
        self._log = MetricsLog(workdir / "metrics.jsonl", start_step) if primary else None
        self.throughput = Throughput()
        self.progress = Progress(task.name, start_step, num_steps, shown=primary and progress)

    def finish(self, pending: _Pending | None) -> None:
        """Waits for a step's metrics, checks them, and writes them if the step is a logged one."""
        if pending is None:
            return
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            raise TrainingDiverged(
                f"{self._name}: loss {values['loss']}, gradient norm {values['grad_norm']} at step"
                f" {pending.step} (last finite: {self._finished}); records of that step:"
                f" {_short(pending.record_ids)}. The last checkpoint is from before."
            )
        self._finished = pending.step
        if pending.step % self._every and pending.step not in (1, self._last):
            return
        row = {"step": pending.step, "loss": values.pop("loss"), **values, **self.throughput.take()}
        if self._log:
            self._log.write(row)
        self.progress.show(row)

    def close(self) -> None:
        self.progress.close()
        if self._log:
            self._log.close()


def _short(record_ids: Any) -> str:
    if record_ids is None:
        return "not named by the data"
    return ", ".join(str(record) for record in np.asarray(record_ids).ravel()[:64].tolist())
