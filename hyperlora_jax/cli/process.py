"""This program's process: alone, or one of several that start, talk and end as one."""

import atexit
import gc
import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import environment

if TYPE_CHECKING:
    from hyperlora_jax.parallel.joint_end import JointEnd

PREEMPTED = 75  # EX_TEMPFAIL: launchers start the same command again
OBJECTS_UNLOOKED_AT = 200_000  # the collector of cycles waits for that many new ones


class Process:
    """Context manager: of an unexpected error inside all processes hear before this one ends.

    Args:
        saves: SIGTERM means "save and leave", on all processes at the same step. Otherwise it ends
            the process as ever: what such a command has finished is on the disk.
    """

    def __init__(self, saves: bool) -> None:
        self._saves = saves
        self._joint: JointEnd | None = None  # once this process has joined others

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._joint is not None:
            from hyperlora_jax.parallel.joint_end import of_error

            self._joint.announce(of_error(error), error)

    def start(self, needs_jax: bool = True) -> bool:
        """Imports JAX as this program wants it and joins the other processes; whether this one
        leaves the talking to another. A process alone that needs no JAX imports none.

        Raises:
            UserError: the environment names other processes in a way that cannot be.
        """
        # Tracing a model and listing its pictures make objects that stay: at Python's own threshold
        # of 700 the collector takes a quarter of the time to the first step.
        gc.set_threshold(OBJECTS_UNLOOKED_AT)
        atexit.register(gc.freeze)  # nor at the end, where all of it is thrown away
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        if not needs_jax and environment.settings(os.environ) is None:
            return False
        devices = ("accel*", "vfio/[0-9]*", "nvidia*")
        if sys.platform == "linux" and not any(any(Path("/dev").glob(d)) for d in devices):
            # libtpu without a TPU (it is installed for `hyperlora compile`) would look for one at
            # length and complain.
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from hyperlora_jax.parallel import compilation_cache, cpu_devices, joint_end, multihost

        cpu_devices.prepare()
        if multihost.start(hears_sigterm=self._saves):
            _keep_stdout()
            self._joint = joint_end.JointEnd()
            self._joint.listen()
        compilation_cache.enable()
        return self._joint is not None and not multihost.is_first()

    def end(self, code: int, line: str) -> int:
        """Says the line and returns the code; where there are others, ends all by this code."""
        if code and self._joint is None:
            self._join_in_error()
        if self._joint is None:
            return said(code, line)
        if code == PREEMPTED:  # on all of them, at a step that they agreed on
            self._joint.stop()
            return said(code, line)
        if code:
            from hyperlora_jax.parallel.joint_end import End

            self._joint.announce(End(code, line))
        self._joint.finish()
        return code

    def _join_in_error(self) -> None:
        """A process whose arguments are wrong joins the others to tell them: they may be right."""
        try:
            if environment.settings(os.environ) is not None:
                self.start()
        except UserError:
            pass


def said(code: int, line: str) -> int:
    """The code, after saying the line on stderr."""
    if line:
        print(line, file=sys.stderr)
    return code


def _keep_stdout() -> None:
    """Leaves standard output to Python: gloo reports every connection there, from C++."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
