"""The loop's ears and mouth: checks every step's metrics, writes the logged ones, times everything.

Only the first process writes; the checks run on all of them, on the same replicated numbers.

metrics.jsonl has one row per logged step, with that step's own values, never running means.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from hyperlora_jax.array_types import Array, ArrayTree, Json
from hyperlora_jax.errors import TrainingDiverged
from hyperlora_jax.parallel import multihost
from hyperlora_jax.parallel.topology import peak_flops
from hyperlora_jax.train.events import EventLog
from hyperlora_jax.train.json_lines import JsonLines, read_rows
from hyperlora_jax.train.trackers import Tracker


def open_metrics(path: epath.PathLike, start_step: int) -> tuple[JsonLines, int]:
    """The metrics file of a run that goes on from `start_step`, without the rows of lost steps;
    and the last step that had been logged."""
    rows = read_rows(path)
    earlier = [row for row in rows if row["step"] <= start_step]
    return JsonLines(path, earlier), max([start_step, *(row["step"] for row in rows)])


def device_memory_gib() -> float | None:
    """Peak memory in use on the first local device; None where the backend does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30


class Throughput:
    """Examples per second and the share of time spent waiting for data, since the last `take`.

    Args:
      units: {"images": 4}: what one example counts for; reported as images_per_second.
    """

    def __init__(self, units: Mapping[str, float | int]):
        self._units = units
        self._peak = peak_flops(jax.devices()[0].device_kind) * jax.device_count()
        self._mfu_per_rate: float | None = None
        self.reset()

    def count_flops(self, per_example: Callable[[], float]) -> None:
        """From now on MFU is reported, where the chip's peak is known; else `per_example`, the
        model FLOPs of one training example, is not called."""
        if self._peak:
            self._mfu_per_rate = per_example() / self._peak

    def reset(self) -> None:
        """Starts a new window now."""
        self._start = time.perf_counter()
        self._examples = 0
        self._wait = 0.0

    def add(self, examples: int, wait_seconds: float) -> None:
        """Counts one step."""
        self._examples += examples
        self._wait += wait_seconds

    def take(self) -> dict[str, float]:
        """The window's figures; starts the next window."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._examples / seconds
        figures = {"examples_per_second": rate, "data_wait": self._wait / seconds}
        figures |= {f"{name}_per_second": rate * count for name, count in self._units.items()}
        if self._mfu_per_rate is not None:
            figures["mfu"] = rate * self._mfu_per_rate
        memory = device_memory_gib()
        if memory is not None:
            figures["memory_gib"] = memory
        self.reset()
        return figures


class Progress:
    """A tqdm bar that also says what happens between steps ("compiling train step…")."""

    def __init__(self, name: str, steps: range, shown: bool):
        self._name = name
        self._bar = tqdm(
            total=steps.stop,
            initial=steps.start,
            desc=name,
            unit="step",
            file=sys.stderr,
            disable=not shown,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def say(self, what: str) -> None:
        """Shows `what` beside the name, at once."""
        self._bar.set_description_str(f"{self._name}: {what}" if what else self._name)

    def advance(self) -> None:
        """One step was dispatched."""
        self._bar.update(1)

    def show(self, row: Json) -> None:
        """Loss and speed of a logged step."""
        parts = [f"loss {row['loss']:.4g}"]
        parts += [
            f"{value:.3g} {name.removesuffix('_per_second')}/s"
            for name, value in row.items()
            if name.endswith("_per_second")
        ]
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        parts.append(f"data wait {row['data_wait']:.0%}")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


@dataclass
class PendingStep:
    """A dispatched step whose metrics are still on the device."""

    step: int
    metrics: Mapping[str, Array]
    record_ids: object


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
    """Metrics, progress bar, trackers and events of one run."""

    def __init__(
        self,
        name: str,
        workdir: epath.Path,
        events: EventLog,
        steps: range,
        *,
        log_every_steps: int,
        units: Mapping[str, float | int],
        shown: bool,
        open_trackers: Callable[[int], Sequence[Tracker]],  # told the last step that was logged
    ):
        self.name, self.events = name, events
        self._every, self._last = log_every_steps, steps.stop
        self._finished = steps.start
        self._losses: list[float] = []
        self._rows, self._trackers = None, []
        if multihost.is_first():
            self._rows, logged = open_metrics(workdir / "metrics.jsonl", steps.start)
            self._trackers = open_trackers(logged)
        self.throughput = Throughput(units)
        self.progress = Progress(name, steps, shown)

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
        for tracker in self._trackers:
            tracker.write(row, step)
        self.progress.show(row)

    def close(self) -> None:
        """Closes what is open."""
        self.progress.close()
        if self._rows is not None:
            self._rows.close()
        for tracker in self._trackers:
            tracker.close()


def _short(record_ids: ArrayTree) -> str:
    if record_ids is None:
        return "not named by the data"
    return ", ".join(str(record) for record in np.asarray(record_ids).ravel()[:64].tolist())
