"""Several processes as one run: start with time-outs, agreement through the coordination service.

Nothing here uses a device collective: a host that hangs must not hang the decision about it.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import environment

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 7 * 86400  # seconds for the slowest host; one that is gone is noticed by its heartbeat


def start(
    timeout_seconds: int = 300, heartbeat_seconds: int = 100, hears_sigterm: bool = True
) -> bool:
    """Joins the other processes if the environment names any; True if it did. Call it first.

    A process that does not arrive within `timeout_seconds` ends all the others by SIGABRT, with
    this process's view of the matter on stderr; one that dies later does so after
    `heartbeat_seconds`. Launchers restart on both.

    `hears_sigterm`: the coordination service takes SIGTERM over, which then ends nothing by itself
    (`train/interruption.py`).
    """
    arguments = environment.settings(os.environ)
    if arguments is None:
        return False
    asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if (asked or os.environ.get("JAX_PLATFORMS", "")).startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", hears_sigterm)
    who = (
        f"process {arguments['process_id']} of {arguments['num_processes']}"
        f" (coordinator {arguments['coordinator_address']})"
        if arguments
        else "this process (addresses from the cluster's environment)"
    )
    # The runtime ends the process when time is up, so the reason is said one second before.
    timer = threading.Timer(
        max(timeout_seconds - 1, 0.5),
        lambda: print(
            f"multi-host start: {who} waited {timeout_seconds} s and not all processes arrived;"
            " look for the ones that did not start, or that have another coordinator address",
            file=sys.stderr,
            flush=True,
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    finally:
        timer.cancel()
    log.info("%s has joined: %d devices", who, jax.device_count())
    return True


def is_first() -> bool:
    """Whether this is process 0, which writes files and says what is done."""
    return jax.process_index() == 0


def client() -> Any:
    """The coordination service's client, None in a single process."""
    from jax._src import distributed  # the only door to the key-value store

    return distributed.global_state.client


def agree(name: str, value: str, timeout_seconds: int = 300) -> str:
    """Process 0's `value` on every process. `name` must be used once in a run.

    Raises:
      UserError: process 0 did not say within `timeout_seconds`.
    """
    service = client()
    if service is None or jax.process_count() == 1:
        return value
    if is_first():
        service.key_value_set(f"hyperlora/{name}", value)
        return value
    try:
        return service.blocking_key_value_get(f"hyperlora/{name}", timeout_seconds * 1000)
    except Exception as error:
        raise UserError(
            f"process {jax.process_index()}: process 0 did not announce {name!r}"
            f" within {timeout_seconds} s"
        ) from error


def barrier(name: str, timeout_seconds: int = 300) -> None:
    """Waits for all processes; the error of a time-out names the missing ones."""
    service = client()
    if service is not None and jax.process_count() > 1:
        service.wait_at_barrier(f"hyperlora/{name}", timeout_seconds * 1000)


def first_then_others(name: str, make: Callable[[], T]) -> T:
    """`make()` on process 0, then on all others: what it keeps in files is made once where hosts
    share a disk, and by everyone where they do not. `name` must be used once in a run."""
    if is_first():
        result = make()
        barrier(name, PATIENCE)
        return result
    barrier(name, PATIENCE)
    return make()


def announce_step(step: int) -> None:
    """Writes this process's last finished step where the others can read it."""
    service = client()
    if service is not None and jax.process_count() > 1:
        key = f"hyperlora/steps/{jax.process_index()}"
        service.key_value_set(key, str(step), allow_overwrite=True)


def announced_steps() -> dict[int, int]:
    """The last finished step of every process that announced one."""
    service = client()
    if service is None or jax.process_count() == 1:
        return {}
    pairs = service.key_value_dir_get("hyperlora/steps/")
    return {int(key.rsplit("/", 1)[1]): int(value) for key, value in pairs}
