"""Where the time of a run goes: events.jsonl, and goodput buckets whose sum is the wall time.

At every moment the loop is in exactly one bucket:

    start     imports, data, placing the frozen base        compile   tracing and compiling the step
    restore   reading a checkpoint                          data      waiting for the next batch
    step      dispatching and waiting for the device        save      the part of a save that blocks
    log       writing metrics

`goodput` adds, over all starts of a workdir, `down` (between a run's last sign of life and the next
start) and moves out of `step` into `lost` what was computed again after a kill.
"""

import time
import uuid
from collections.abc import Callable

from etils import epath

from hyperlora_jax.array_types import Json
from hyperlora_jax.train.json_lines import JsonLines, read_rows

BUCKETS = ("start", "restore", "compile", "data", "step", "save", "log")


class EventLog:
    """Switches between buckets and writes events; writes nothing if `path` is None."""

    def __init__(self, path: epath.PathLike | None, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._run = uuid.uuid4().hex[:12]
        self.seconds: dict[str, float] = dict.fromkeys(BUCKETS, 0.0)
        self._bucket, self._since, self._started = "start", clock(), clock()
        self._written = 0.0
        rows = read_rows(path) if path is not None else []
        self._file = JsonLines(path, rows) if path is not None else None
        self.event("start")

    def switch(self, bucket: str) -> None:
        """From now on time belongs to `bucket`."""
        now = self._clock()
        self.seconds[self._bucket] += now - self._since
        self._bucket, self._since = bucket, now

    def event(self, name: str, **facts: object) -> None:
        """Writes one row: what happened, when, and the buckets so far."""
        self.switch(self._bucket)
        if self._file is None:
            return
        buckets = {bucket: round(value, 6) for bucket, value in self.seconds.items()}
        row = {"run": self._run, "time": round(self._since, 6), "event": name, **facts}
        self._file.write({**row, "wall": round(self._since - self._started, 6), "buckets": buckets})
        self._written = self._since

    def alive(self, step: int, every_seconds: float = 10.0) -> None:
        """Writes the step reached, at most every so many seconds: a killed run's last words."""
        if self._clock() - self._written > every_seconds:
            self.event("alive", step=step)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def goodput(path: epath.PathLike) -> dict[str, float]:
    """Seconds per bucket over all starts of a workdir, with `down`, `lost` and `wall`, their sum.

    Returns {} for a workdir without events. A killed run counts up to its last row.
    """
    runs: dict[str, list[Json]] = {}
    for row in read_rows(path):
        runs.setdefault(row["run"], []).append(row)
    if not runs:
        return {}
    total = {**dict.fromkeys(BUCKETS, 0.0), "down": 0.0, "lost": 0.0}
    previous_end = previous_step = None
    previous_step_seconds = 0.0
    for rows in runs.values():
        last = rows[-1]
        for bucket, value in last["buckets"].items():
            total[bucket] += value
        begin = last["time"] - last["wall"]
        if previous_end is not None:
            total["down"] += begin - previous_end
        first_step = next((row["step"] for row in rows if row["event"] == "resume"), 0)
        if previous_step is not None and previous_step > first_step:
            lost = (previous_step - first_step) * previous_step_seconds
            total["lost"] += lost
            total["step"] -= lost
        steps = [row["step"] for row in rows if "step" in row]
        previous_end, previous_step = last["time"], max(steps, default=first_step)
        done = previous_step - first_step
        previous_step_seconds = last["buckets"]["step"] / done if done else 0.0
    total["wall"] = sum(total.values())
    return total


def as_text(buckets: dict[str, float]) -> str:
    """The buckets as one line: seconds and shares, largest first."""
    wall = buckets["wall"]
    parts = sorted(((v, k) for k, v in buckets.items() if k != "wall" and v > 0), reverse=True)
    shares = ", ".join(f"{name} {value:.1f} s ({value / wall:.0%})" for value, name in parts)
    return f"wall {wall:.1f} s: {shares}"
