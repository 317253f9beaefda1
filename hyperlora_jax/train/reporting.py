"""The loop's ears and mouth: checks every step's metrics, writes the logged ones, times everything.

Only the first process writes; the checks run on all of them, on the same replicated numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from hyperlora_jax.array_types import Array, ArrayTree
from hyperlora_jax.errors import TrainingDiverged
from hyperlora_jax.parallel import multihost
from hyperlora_jax.train.events import EventLog
from hyperlora_jax.train.metrics import Progress, Throughput, open_metrics
from hyperlora_jax.train.tensorboard import Board


@dataclass
class PendingStep:
    """A dispatched step whose metrics are still on the device."""

    step: int
    metrics: Mapping[str, Array]
    record_ids: Any


@dataclass(frozen=True)
class Profile:
    """A trace of the steps of a window (first, last), for TensorBoard's profiler."""

    folder: epath.Path
    window: tuple[int, int]

    def before(self, step: int) -> None:
        """Starts it if this is the first step."""
        if step == self.window[0]:
            jax.profiler.start_trace(str(self.folder))

    def after(self, step: int, state: ArrayTree) -> None:
        """Ends it when the last step's arrays are there."""
        if step == self.window[1]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()


class Report:
    """Metrics, progress bar, TensorBoard and events of one run."""

    def __init__(
        self,
        name: str,
        workdir: epath.Path,
        events: EventLog,
        start_step: int,
        num_steps: int,
        *,
        log_every_steps: int,
        units: Mapping[str, float | int],
        progress: bool,
        tensorboard: bool,
    ):
        primary = multihost.is_first()
        self.name, self.events = name, events
        self._every, self._last = log_every_steps, num_steps
        self._finished = start_step
        self._losses: list[float] = []
        self._rows = open_metrics(workdir / "metrics.jsonl", start_step) if primary else None
        self._board = Board(workdir) if tensorboard and primary else None
        self.throughput = Throughput(units)
        self.progress = Progress(name, start_step, num_steps, shown=primary and progress)

    def count_flops(
        self,
        model_flops: Callable[..., float],
        params: ArrayTree,
        frozen: ArrayTree,
        batch: Mapping[str, Array],
        key: Array,
    ) -> None:
        """Reports MFU from now on, by the model FLOPs of a batch (see `Task`)."""
        if self._rows is None:  # another process reports
            return
        examples = len(next(iter(batch.values())))
        self.throughput.count_flops(lambda: model_flops(params, frozen, batch, key) / examples)

    def finish(self, pending: PendingStep | None) -> None:
        """Waits for a step's metrics, checks them, and writes them if the step is a logged one.

        Raises:
          TrainingDiverged: names the window of steps and the records of the batch.
        """
        if pending is None:
            return
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            self.events.event("diverged", step=pending.step)
            raise TrainingDiverged(
                f"{self.name}: loss {values['loss']}, gradient norm {values['grad_norm']} at step"
                f" {pending.step} (last finite: {self._finished}); records of that step:"
                f" {_short(pending.record_ids)}. The last checkpoint is from before."
            )
        self._finished = pending.step
        self._losses.append(values["loss"])
        if pending.step % self._every == 0 or pending.step in (1, self._last):
            self.events.switch("log")
            self._write(pending.step, values)
            self.events.switch("step")

    def mean_loss(self) -> float:
        """Of the finished steps since the last call, at least one."""
        mean = float(np.mean(self._losses))
        self._losses.clear()
        return mean

    def _write(self, step: int, values: dict[str, float]) -> None:
        row = {"step": step, "loss": values.pop("loss"), **values, **self.throughput.take()}
        if self._rows is not None:
            self._rows.write(row)
            self.events.alive(step)
        if self._board is not None:
            self._board.write(row, step)
        self.progress.show(row)

    def close(self) -> None:
        """Closes what is open."""
        self.progress.close()
        for writer in (self._rows, self._board):
            if writer is not None:
                writer.close()


def _short(record_ids: Any) -> str:
    if record_ids is None:
        return "not named by the data"
    return ", ".join(str(record) for record in np.asarray(record_ids).ravel()[:64].tolist())
