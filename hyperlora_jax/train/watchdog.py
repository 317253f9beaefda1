"""Ends a run that makes no progress: a hung collective cannot be interrupted from inside."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax

from hyperlora_jax.parallel import multihost

POLL_SECONDS = 1.0


def diagnosis(step: int, seconds: float, announced: dict[int, int]) -> str:
    """What is known about a stall; with several processes it names those that are behind."""
    text = f"no progress for {seconds:.0f} s after step {step} (process {jax.process_index()})"
    if announced:
        slowest = min(announced.values())
        behind = sorted(index for index, reached in announced.items() if reached == slowest)
        if slowest < max(announced.values()):
            text += f"; behind are processes {behind}, which last finished step {slowest}"
        else:
            text += f"; all processes finished step {slowest} and hang in the next one"
        absent = sorted({*range(jax.process_count())} - {*announced})
        if absent:
            text += f"; processes {absent} never finished a step"
    return text


def end_process(message: str) -> None:
    """Says why, shows where every thread is, and dies by SIGABRT: launchers start again."""
    print(f"stalled: {message}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.__stderr__)
    os.kill(os.getpid(), signal.SIGABRT)


class Watchdog:
    """Context manager; `beat` after every finished step. A time-out of 0 switches it off."""

    def __init__(self, timeout_seconds: float | int, on_stall: Callable[[str], None] = end_process):
        self._timeout = timeout_seconds
        self._on_stall = on_stall
        self._step, self._last = 0, time.monotonic()
        self._stop = threading.Event()
        self._armed = False
        self._announced = 0.0

    def __enter__(self) -> "Watchdog":
        if self._timeout > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def beat(self, step: int) -> None:
        """A step is finished; the first beat arms the watch (compiling may take long)."""
        self._step, self._last, self._armed = step, time.monotonic(), True
        if self._last - self._announced > POLL_SECONDS:
            multihost.announce_step(step)
            self._announced = self._last

    def pause(self) -> None:
        """Stops watching until the next beat."""
        self._armed = False

    def _watch(self) -> None:
        while not self._stop.wait(min(POLL_SECONDS, self._timeout / 4)):
            silent = time.monotonic() - self._last
            if self._armed and silent > self._timeout:
                multihost.announce_step(self._step)
                time.sleep(min(POLL_SECONDS, self._timeout / 4))  # so that all have announced
                self._on_stall(diagnosis(self._step, silent, multihost.announced_steps()))
                return
