"""What a run shows and writes: metrics.jsonl and the progress bar.

metrics.jsonl has one row per logged step, with that step's own values, never running means.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from hyperlora_jax.parallel.topology import peak_flops
from hyperlora_jax.train.json_lines import JsonLines, read_rows


def open_metrics(path: epath.PathLike, start_step: int) -> JsonLines:
    """The metrics file of a run that goes on from `start_step`: rows of lost steps are dropped."""
    return JsonLines(path, [row for row in read_rows(path) if row["step"] <= start_step])


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

    def __init__(self, name: str, start_step: int, num_steps: int, shown: bool):
        self._name = name
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
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

    def show(self, row: Mapping[str, Any]) -> None:
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
