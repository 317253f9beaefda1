"""The training loop. Read this file first: everything else in the folder serves one line of it.

`fit_section` is `fit` as a config's section describes it.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

import hyperlora_jax
from hyperlora_jax import storage
from hyperlora_jax.array_types import Array, ArrayTree, Json, Params
from hyperlora_jax.errors import TrainingDiverged, UserError
from hyperlora_jax.parallel import multihost, sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.train import flop_count, trackers
from hyperlora_jax.train.checkpoints import Checkpoints, changed_settings, check_facts, read_meta
from hyperlora_jax.train.events import EventLog, as_text, goodput
from hyperlora_jax.train.interruption import PreemptionGuard, Watchdog
from hyperlora_jax.train.optimizer import make_optimizer
from hyperlora_jax.train.reporting import PendingStep, Profile, Report
from hyperlora_jax.train.state import (
    TrainState,
    abstract_state,
    first_state,
    state_builder,
    state_shardings,
)
from hyperlora_jax.train.step import Loss, Step, jit_step

__all__ = ["Batches", "Plan", "Task", "TrainingDiverged", "fit", "open_workdir"]
log = logging.getLogger(__name__)
LAST_SAVE_SECONDS = 20.0  # for a save under way when one of several processes fails
VERSIONS = {"versions": {"hyperlora_jax": hyperlora_jax.__version__, "jax": jax.__version__}}


@runtime_checkable
class Batches(Protocol):
    """An endless iterator over this process's part of each batch, whose position can be kept.

    A batch is {name: array [b, ...], or a tree of them}; "record_id" stays on the host and is named
    when a loss is not finite. The state is JSON, the same on every host (it counts batches).
    """

    def __next__(self) -> Mapping[str, object]: ...
    def get_state(self) -> Json:
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
      units: {"images": 4, "loras": 1}: what one example of a batch counts for, for images/s.
      model_flops: (params, frozen, batch, key) → model FLOPs of training on a batch, for MFU; None
        is three times the forward pass, as where nothing that costs is frozen.
      start: parameters to go on from, where `init` does not draw new ones.
    """

    name: str
    init: Callable[[Array], ArrayTree]
    loss: Loss
    frozen: ArrayTree
    batches: Batches
    facts: Mapping[str, object] = field(default_factory=dict)
    units: Mapping[str, float | int] = field(default_factory=dict)
    model_flops: Callable[..., float] | None = None
    start: ArrayTree | None = None


@dataclass(frozen=True)
class Plan:
    """How a task is trained.

    Attributes:
      optimizer: keyword arguments of `make_optimizer`.
      ema_decay: of the average of the parameters; None averages none.
      keep, keep_best: so many of the newest checkpoints stay, and of the lowest mean loss.
      trackers: names of `trackers.PACKAGES`.
      profile_steps: (first, last) step of a profile in WORKDIR/profile.
    """

    num_steps: int
    optimizer: Json
    ema_decay: float | None = None
    log_every_steps: int = 10
    checkpoint_every_steps: int = 1000
    keep: int = 2
    keep_best: int = 1
    trackers: Sequence[str] = ()
    profile_steps: tuple[int, int] | None = None
    stall_timeout_seconds: float | int = 1800


def open_workdir(workdir: epath.PathLike) -> epath.Path:
    """Creates the folder and proves that it can be written; UserError if it cannot."""
    try:
        path = epath.Path(workdir)
        probe = path / f".writable-{jax.process_index()}"
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # a bucket's file system has errors of its own
        raise UserError(
            f"--workdir {workdir}: cannot write there ({storage.reason(error)});"
            " expected a folder that can be created and written"
        ) from error
    return path


def fit(
    task: Task,
    plan: Plan,
    *,
    workdir: epath.PathLike,
    mesh: Mesh | None = None,
    seed: int = 0,
    config: Json | None = None,
    progress: bool = True,
) -> TrainState:
    """Trains `task` as planned, from the newest checkpoint in `workdir` if there is one; a finished
    workdir gives its state at once. `config`, the resolved one, is kept beside the checkpoints.

    Raises:
      UserError: unusable workdir, checkpoint of other facts, of more steps, or of a state that has
        other parts; indivisible batch, data that ends.
      TrainingDiverged: a loss or gradient that is not finite.
      Preempted, Interrupted: SIGTERM or Ctrl-C came; the step is saved.
    """
    # ---- Workdir, mesh, optimiser
    workdir = open_workdir(workdir)
    mesh = make_mesh() if mesh is None else mesh
    transform, rate = make_optimizer(plan.num_steps, **plan.optimizer)
    replicated = sharding.replicated(mesh)
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=replicated)()

    # ---- Shapes and shardings, before any array exists
    build = state_builder(task.init, transform, with_ema=plan.ema_decay is not None)
    shapes = jax.eval_shape(build, key)
    shardings = state_shardings(shapes, mesh)
    meta = {
        "facts": dict(task.facts),
        "settings": {
            "ema_decay": plan.ema_decay, "optimizer": dict(plan.optimizer), "seed": seed,
        },
        "config": dict(config or {}),
        "seed": seed,
        **VERSIONS,
    }  # fmt: skip

    # ---- State: the newest whole checkpoint, or a new one
    primary = multihost.is_first()
    checkpoints = Checkpoints(workdir, plan.keep, plan.keep_best)
    start_step = checkpoints.latest_step
    finished = start_step is not None and start_step >= plan.num_steps
    events = EventLog(workdir / "events.jsonl" if primary and not finished else None)
    if start_step is None:
        events.switch("compile")
        state, start_step = first_state(build, key, task.start, transform, shardings), 0
        if primary and progress and mesh.size > 1:
            print(sharding.describe(shapes.params, shardings.params), file=sys.stderr)
    else:
        events.switch("restore")
        changed = _changed_since(checkpoints, start_step, plan.num_steps, meta)
        state, position = checkpoints.restore(start_step, abstract_state(shapes, shardings))
        log.info("%s: restored step %d", task.name, start_step)
        if primary and progress:
            for line in [*changed, f"already at step {start_step}"][: None if finished else -1]:
                print(f"{task.name}: {line}")
        if finished:
            checkpoints.close()
            return state
        task.batches.set_state(position)
    events.event("resume", step=start_step)

    # ---- Frozen base, placed once; the jitted step
    events.switch("start")
    frozen_places = sharding.param_shardings(task.frozen, mesh, sharding.REPLICATED_RULES)
    frozen = sharding.place(task.frozen, frozen_places)
    step_fn = jit_step(
        mesh, shardings, frozen_places,
        loss=task.loss, optimizer=transform, rate=rate, ema_decay=plan.ema_decay,
    )  # fmt: skip

    # ---- The steps
    if primary:
        (workdir / "config.json").write_text(json.dumps(meta, indent=1))
    steps = range(start_step, plan.num_steps)
    report = Report(
        task.name, workdir, events, steps, log_every_steps=plan.log_every_steps,
        units=task.units, shown=primary and progress,
        open_trackers=lambda logged: trackers.open_trackers(
            plan.trackers, trackers.Run(workdir, task.name, meta["config"], steps.start, logged)
        ),
    )  # fmt: skip
    profile = Profile(workdir / "profile", plan.profile_steps) if plan.profile_steps else None
    run = _Run(task, mesh, step_fn, frozen, key, checkpoints, meta, events, report, profile)
    patience = None
    try:
        with PreemptionGuard() as guard, Watchdog(plan.stall_timeout_seconds) as watchdog:
            state = run.steps(state, steps, plan.checkpoint_every_steps, guard, watchdog)
        events.event("end", step=steps.stop)
    except BaseException:
        patience = LAST_SAVE_SECONDS if jax.process_count() > 1 else None
        raise
    finally:
        report.close()
        events.close()
        checkpoints.close(patience)
    if primary:
        log.info("%s: %s", task.name, as_text(goodput(workdir / "events.jsonl")))
    return state


def _changed_since(checkpoints: Checkpoints, step: int, num_steps: int, meta: Json) -> list[str]:
    """What is told of a run that goes on from a step: its settings that are others now.

    Raises:
      UserError: the checkpoint is of other facts, or of more steps.
    """
    where = str(checkpoints.directory / str(step))
    saved, settings = read_meta(checkpoints.directory, step), meta["settings"]
    check_facts(saved["facts"], meta["facts"], where)
    if step > num_steps:
        raise UserError(
            f"{where}: the run is at step {step}, num_steps is {num_steps}; expected more, or "
            "another workdir"
        )
    changed = changed_settings(saved.get("settings", settings), settings, where)
    return [
        f"{name} is {now} from step {step} on, was {before}"
        for name, (before, now) in changed.items()
    ]


@dataclass(frozen=True)
class _Run:
    task: Task
    mesh: Mesh
    step_fn: Step
    frozen: ArrayTree
    key: Array
    checkpoints: Checkpoints
    meta: Json
    events: EventLog
    report: Report
    profile: Profile | None

    def steps(
        self,
        state: TrainState,
        steps: range,
        checkpoint_every_steps: int,
        guard: PreemptionGuard,
        watchdog: Watchdog,
    ) -> TrainState:
        """While the device computes a step, the host reads the next batch."""
        events, report = self.events, self.report
        pending: PendingStep | None = None
        for step in range(steps.start + 1, steps.stop + 1):
            # ---- Data
            batch, record_ids = self._next_batch(step)
            if self.profile:
                self.profile.before(step)

            # ---- Dispatch
            first = step == steps.start + 1
            events.switch("compile" if first else "step")
            if first:
                report.progress.say("compiling train step…")
                count = self.task.model_flops or flop_count.of_training(self.task.loss)
                report.count_flops(count, state.params, self.frozen, batch, self.key)
            state, metrics = self.step_fn(state, self.frozen, batch, self.key)
            if first:
                jax.block_until_ready(metrics)
                report.progress.say("")
                report.throughput.reset()
                events.event("compiled", step=step)
                events.switch("step")

            # ---- Metrics of the step before are fetched only now, with this one dispatched
            report.finish(pending)
            pending = PendingStep(step, metrics, record_ids)
            report.progress.advance()
            watchdog.beat(step)
            if self.profile:
                self.profile.after(step, state)

            # ---- Save: at intervals, at the end, and when the machine is taken away
            preempted = guard.reached(step)
            if preempted or step == steps.stop or step % checkpoint_every_steps == 0:
                report.finish(pending)  # nothing that is not finite is ever saved
                pending = None
                watchdog.pause()
                self._save(step, state, wait=preempted or step == steps.stop)
                watchdog.beat(step)
            if preempted and step < steps.stop:
                events.event("preempted", step=step)
                raise guard.stopped(step, str(self.checkpoints.directory.parent))
        return state

    def _next_batch(self, step: int) -> tuple[Params, object]:
        """(global batch, record ids) of one step."""
        self.events.switch("data")
        waited = time.perf_counter()
        try:
            batch = dict(next(self.task.batches))
        except StopIteration:
            ended = f"{self.task.name}: the data ended before step {step}, expected it to repeat"
            raise UserError(ended) from None
        record_ids = batch.pop("record_id", None)
        placed = sharding.put_batch(batch, self.mesh)
        waited = time.perf_counter() - waited
        self.report.throughput.add(len(jax.tree.leaves(placed)[0]), waited)
        return placed, record_ids

    def _save(self, step: int, state: TrainState, wait: bool) -> None:
        self.events.switch("save")
        position = self.task.batches.get_state()
        self.checkpoints.save(step, state, position, self.meta, self.report.mean_loss())
        if wait:
            self.checkpoints.wait()
            multihost.barrier(f"saved/{step}")
        self.events.event("save", step=step)
        self.events.switch("step")


OPTIONS = ("keep", "keep_best", "trackers", "stall_timeout_seconds")


def arithmetic_dtype(section: ConfigDict) -> np.dtype:
    """The dtype that a `train` section names.

    Raises:
        UserError: it is neither float32 nor bfloat16.
    """
    if section.dtype not in ("float32", "bfloat16"):
        raise UserError(f"train.dtype: got {section.dtype!r}, expected float32 or bfloat16")
    return jnp.dtype(section.dtype)


def export_folder(config: ConfigDict, workdir: epath.PathLike, name: str) -> epath.Path:
    """Where the result goes: `export.path`, or WORKDIR/name where that is empty.

    Raises:
        UserError: in the installed package, unless `export.into_package` is True.
    """
    out = epath.Path(config.export.path or epath.Path(workdir) / name)
    if not config.export.get("into_package", False):
        storage.outside_package(out, "export.path")
    return out


def global_batch(batch_size: int, section: ConfigDict, mesh: Mesh | None) -> int:
    """Examples a step over all devices, of which a `train` section may name one device's."""
    if mesh is None or not section.batch_per_device:
        return batch_size
    return batch_size * mesh.shape["data"] * mesh.shape["fsdp"]


def fit_section(
    task: Task, section: ConfigDict, config: ConfigDict, workdir: epath.PathLike, mesh: Mesh
) -> Params:
    """Trains `task`; returns its averaged parameters, or the last ones where none are averaged,
    on every host.

    Args:
        section: ConfigDict with num_steps, optimizer, log_every_steps, checkpoint_every_steps and
            ema_decay (None: no average); and what else of `OPTIONS` differs from `Plan`'s.
        config: the whole ConfigDict, kept beside the checkpoints; `train.seed` is the seed.

    Raises:
        UserError, TrainingDiverged, Preempted: see `loop.fit`.
    """
    window = tuple(section.get("profile_steps", ()))
    if window and not (len(window) == 2 and 1 <= window[0] <= window[1]):
        raise UserError(f"train.profile_steps: got {window}, expected () or (first, last)")
    plan = Plan(
        section.num_steps,
        dict(section.optimizer),
        section.ema_decay,
        section.log_every_steps,
        section.checkpoint_every_steps,
        profile_steps=window or None,
        **{name: section[name] for name in OPTIONS if name in section},
    )
    seed = config.train.seed
    state = fit(task, plan, workdir=workdir, mesh=mesh, seed=seed, config=config.to_dict())
    return sharding.gather(state.params if state.ema is None else state.ema, mesh)
