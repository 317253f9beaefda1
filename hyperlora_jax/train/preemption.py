"""SIGTERM means "save and leave": the loop asks after every step whether it was sent.

One process: a local flag, which Ctrl-C sets too; a second Ctrl-C leaves at once. Several processes:
JAX's coordination service makes all of them agree on one later step, so that all save the same
step. No device collective takes part in the decision.
"""

import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from hyperlora_jax.errors import Interrupted, Preempted

EXIT_CODE = 75  # EX_TEMPFAIL: launchers start the same command again


class PreemptionGuard:
    """Context manager that notices SIGTERM, and the first Ctrl-C, while it is open."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._interrupted = False
        self._previous: dict[int, Any] = {}

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

    def request(self) -> None:
        """What SIGTERM does, for callers that learn of an eviction otherwise."""
        self._flag.set()

    def stopped(self, step: int, workdir: str) -> Preempted | Interrupted:
        """What to raise once `step` has been saved."""
        return (Interrupted if self._interrupted else Preempted)(step, workdir)

    def reached(self, step: int) -> bool:
        """Whether to save now. Every process must ask after every step, with the same `step`."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._flag.is_set()
