"""SIGTERM means "save and leave": the loop asks after every step whether it was sent.

One process: a local flag. Several processes: JAX's coordination service makes all of them agree on
one later step, so that all save the same step. No device collective takes part in the decision.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL: launchers start the same command again


class Preempted(Exception):
    """The run was told to stop and has saved `step`; start the same command again to go on."""

    def __init__(self, step: int, workdir: str):
        super().__init__(f"preempted: saved step {step} in {workdir}; the same command continues")
        self.step = step
        self.workdir = workdir


class PreemptionGuard:
    """Context manager that notices SIGTERM while it is open."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> "PreemptionGuard":
        # With several processes the coordination service owns the signal: replacing its handler
        # would keep the other processes from hearing of it.
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
            self._installed = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._flag.set()

    def request(self) -> None:
        """What SIGTERM does, for callers that learn of an eviction otherwise."""
        self._flag.set()

    def reached(self, step: int) -> bool:
        """Whether to save now. Every process must ask after every step, with the same `step`."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._flag.is_set()
