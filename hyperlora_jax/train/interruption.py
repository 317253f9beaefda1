"""What ends a run before its last step: a signal, or a hang.

SIGTERM means "save and leave": the loop asks after every step whether it was sent.

One process: a local flag, which Ctrl-C sets too; a second Ctrl-C leaves at once. Several processes:
JAX's coordination service makes all of them agree on one later step, so that all save the same
step. No device collective takes part in the decision.

The watchdog ends a run that makes no progress: a hung collective cannot be interrupted from inside.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

from hyperlora_jax.errors import Interrupted, Preempted
from hyperlora_jax.parallel import multihost


class PreemptionGuard:
    """Context manager that notices SIGTERM, and the first Ctrl-C, while it is open."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._interrupted = False
        self._previous: dict[int, signal.Handlers | int | Callable[..., object] | None] = {}

    def __enter__(self) -> "PreemptionGuard":
        # With several processes the coordination service owns the signal: replacing its handler
        # would keep the other processes from hearing of it.
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_signal)}
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else not ours
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous or signal.SIG_DFL)
        self._previous = {}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self._flag.set()
        if signum == signal.SIGINT:
            self._interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("\nsaving after this step; Ctrl-C again leaves at once", file=sys.stderr)

    def stopped(self, step: int, workdir: str) -> Preempted | Interrupted:
        """What to raise once `step` has been saved."""
        return (Interrupted if self._interrupted else Preempted)(step, workdir)

    def reached(self, step: int) -> bool:
        """Whether to save now. Every process must ask after every step, with the same `step`."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._flag.is_set()


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
    faulthandler.dump_traceback(file=sys.__stderr__ or 2)
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
