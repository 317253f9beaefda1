"""Several processes end together, within seconds and by the same exit code.

A process that fails alone would wait in JAX's shutdown barrier for the others, and they for it in
whatever they share, until all die minutes later by a signal, on which launchers start again. So an
end is announced in the coordination service's store, where a thread of every process looks for it.
The announcer stays until all have heard: nobody meets a closed connection before its reason.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import NoReturn

import jax

from hyperlora_jax.parallel import multihost

ENDS, HEARD = "hyperlora/end/", "hyperlora/end-heard/"
POLL_SECONDS = 1.0
GRACE_SECONDS = 20.0  # for the others to hear; after that they notice by a missing heartbeat
LOST = -signal.SIGABRT  # the machine's fault, not the run's: launchers start again on a signal
# How JAX and gloo say that a process they talk to is gone.
LOST_SIGNS = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "UNAVAILABLE")


@dataclass(frozen=True)
class End:
    """Why a process ends: an exit code, or a signal as a negative number, and one line."""

    code: int
    line: str


def of_error(error: BaseException) -> End:
    """What an error that nobody expected makes: 1 for a bug, SIGABRT where a process was lost."""
    text = str(error).strip() or repr(error)
    of_runtime = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in text
    lost = of_runtime and any(sign in text for sign in LOST_SIGNS)
    return End(LOST if lost else 1, f"{type(error).__name__}: {text.splitlines()[0]}")


class JointEnd:
    """This process's part. `listen` once all have joined (`multihost.start`), `finish` last."""

    def __init__(self) -> None:
        self._own = str(jax.process_index())
        self._client = multihost.client()
        self._ending = threading.Lock()  # whoever holds it ends the process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="joint end", daemon=True)

    def listen(self) -> None:
        """From now on this process ends when another one announces that it does."""
        self._thread.start()

    def finish(self) -> None:
        """A good end: waits for the others, whose work may take hours more, and may still fail."""
        multihost.barrier("finished", multihost.PATIENCE)
        self.stop()

    def stop(self) -> None:
        """Listens no more."""
        self._stop.set()
        self._thread.join()

    def announce(self, end: End, error: BaseException | None = None) -> NoReturn:
        """Says the end's line, or the whole of an unexpected error, and ends all processes by it;
        or only this one, by the end of another that came first and that this one follows from."""
        self._ending.acquire()
        heard = self._announced()
        if heard:
            self._follow(heard)
        if error is not None:
            traceback.print_exception(error)
        elif end.line:
            print(end.line, file=sys.stderr)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # as in `_announced`
            self._client.key_value_set(ENDS + self._own, json.dumps([end.code, end.line]))
        self._leave(end)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            heard = self._announced()
            if heard and self._ending.acquire(blocking=False):
                self._follow(heard)

    def _announced(self) -> dict[str, End]:
        """Ends by the process that announced them."""
        try:
            pairs = self._client.key_value_dir_get(ENDS)
        except jax.errors.JaxRuntimeError:  # the service is gone, for which JAX ends the process
            return {}
        return {key.rsplit("/", 1)[1]: End(*json.loads(text)) for key, text in pairs}

    def _follow(self, heard: dict[str, End]) -> NoReturn:
        process, end = next(iter(heard.items()))
        print(f"process {process} ended this run: {end.line}", file=sys.stderr)
        self._leave(end)

    def _leave(self, end: End) -> NoReturn:
        """Ends this process without Python's or JAX's farewell, once the others may do so too."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if end.code < 0:  # a process is gone: it will not hear, and the others find that out too
            os.kill(os.getpid(), -end.code)
        self._let_the_others_hear()
        os._exit(end.code)

    def _let_the_others_hear(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(HEARD + self._own, "")
            first = multihost.is_first()
            if first or self._own in self._announced():
                self._wait_for_all()
            if first:  # the service lives in this process: the others leave before it does
                time.sleep(POLL_SECONDS)

    def _wait_for_all(self) -> None:
        last = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < last:
            if len(self._client.key_value_dir_get(HEARD)) >= jax.process_count():
                return
            time.sleep(POLL_SECONDS / 5)
