"""metrics.jsonl (one row per logged step, that step's own values) and the progress bar."""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from tqdm import tqdm


class MetricsLog:
    """Appends rows to `path`; rows after `start_step` (of a run that lost them) are dropped."""

    def __init__(self, path: epath.PathLike, start_step: int):
        self._path = epath.Path(path)
        rows = [row for row in read_rows(self._path) if row["step"] <= start_step]
        self._text = "".join(json.dumps(row) + "\n" for row in rows)
        self._path.write_text(self._text)
        self._file = self._path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; numbers that JSON cannot hold become null."""
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut off by a kill is left out; none if no file."""
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Throughput:
    """Examples per second and the share of time spent waiting for data, since the last `take`."""

    def __init__(self) -> None:
        self.reset()

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
        figures = {
            "examples_per_second": self._examples / seconds,
            "data_wait": self._wait / seconds,
        }
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
        """Shows `what` in place of the loss, at once."""
        self._bar.set_description_str(f"{self._name}: {what}" if what else self._name)

    def advance(self) -> None:
        """One step was dispatched."""
        self._bar.update(1)

    def show(self, row: Mapping[str, Any]) -> None:
        """Loss and examples/s of a logged step."""
        self._bar.set_postfix_str(
            f"loss {row['loss']:.4g}, {row['examples_per_second']:.3g} examples/s,"
            f" data wait {100 * row['data_wait']:.0f}%",
            refresh=False,
        )

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
