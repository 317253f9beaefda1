"""What `hyperlora demo` shows while it works: one bar for each stage, with the time left.

All else that is printed meanwhile, by libraries and by C++ too, goes to the end of a log file. How
far a stage is, is read from there: the bars of its parts end in it as well.
"""

import contextlib
import dataclasses
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

BAR = re.compile(r"^(.*?):? +(\d+)%\|")
EVERY = 0.3  # seconds between two looks at the log
LOOKED_AT = 8192  # bytes of the log
KNOWN = 0.15  # of a stage, from where on its own pace tells the time left


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the demo.

    Attributes:
        title: what it does, in words.
        seconds: how long it takes on two cores.
        parts: (how a line of output begins, share of the stage that is done when it does, and when
            its bar is full), in order.
    """

    title: str
    seconds: float
    parts: tuple[tuple[str, float, float], ...] = ()

    def done(self, line: str) -> float:
        """The share that a line of output tells, 0 where it tells none."""
        bar = BAR.match(line)
        name, filled = (bar[1], int(bar[2]) / 100) if bar else (line, 0.0)
        for start, begins, ends in self.parts:
            if name.startswith(start):
                return begins + filled * (ends - begins)
        return 0.0


class Screen:
    """Shows stages one after another; see `opened`."""

    def __init__(self, console: Console, log: Path):
        self._console, self._log = console, log
        self._expected = self._took = 0.0
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, stage: Stage) -> Iterator[None]:
        """A bar as long as what is inside runs; how long it took is in `seconds` afterwards."""
        start, offset = time.perf_counter(), self._log.stat().st_size
        pace = self._took / self._expected if self._expected else 1.0
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.percentage:3.0f} %  [dim]{task.fields[left]}"),
        )
        with Progress(
            *columns,
            console=self._console,
            refresh_per_second=4,
            redirect_stdout=False,  # they go to the log
            redirect_stderr=False,
        ) as progress:
            task = progress.add_task(f"{stage.title:<46}", total=1.0, left="")
            ended = threading.Event()

            def watch() -> None:
                done = 0.0
                while not ended.wait(EVERY):
                    elapsed = time.perf_counter() - start
                    done = max([done, *map(stage.done, _lines(self._log, offset))])
                    usual = stage.seconds * pace
                    if not stage.parts:
                        done = min(0.95, elapsed / usual)
                    left = (elapsed / done if done > KNOWN else usual) - elapsed
                    progress.update(task, completed=min(done, 0.99), left=f"{_told(left)} left")

            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            try:
                yield
                took = time.perf_counter() - start
                ended.set()
                watcher.join()
                progress.update(task, completed=1.0, left=_told(took))
            finally:
                ended.set()
                watcher.join()
                _without_bars(self._log, offset)
        self.seconds[name] = took
        if took > stage.seconds / 4:  # else it was done before
            self._expected, self._took = self._expected + stage.seconds, self._took + took


@contextlib.contextmanager
def opened(log: Path, console: Console | None = None) -> Iterator[Screen]:
    """A screen on this terminal, or on `console`; what is printed inside goes to the log."""
    sys.stdout.flush()
    sys.stderr.flush()
    copies = {number: os.dup(number) for number in (1, 2)}
    with log.open("ab") as file, os.fdopen(os.dup(1), "w", encoding="utf-8") as terminal:
        console = console or Console(file=terminal, width=Console().width)
        for number in copies:
            os.dup2(file.fileno(), number)
        try:
            yield Screen(console, log)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, own in copies.items():
                os.dup2(own, number)
                os.close(own)


def _lines(log: Path, offset: int) -> list[str]:
    """What was written to the log at last, but since `offset`, a bar's states one by one."""
    with log.open("rb") as file:
        file.seek(max(offset, log.stat().st_size - LOOKED_AT))
        return re.split(r"[\r\n]+", file.read().decode(errors="replace"))


def _without_bars(log: Path, offset: int) -> None:
    """Leaves of every bar in the log, since `offset`, its last state."""
    with log.open("r+b") as file:
        file.seek(offset)
        text = file.read()
        file.seek(offset)
        file.write(re.sub(rb"[^\r\n]*\r(?!\n)", b"", text))
        file.truncate()


def _told(seconds: float) -> str:
    """ "40 s", "3 min"."""
    if seconds < 1:
        return "a moment"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
