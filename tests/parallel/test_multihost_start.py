import os
import signal
import socket
import subprocess
import sys

import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import environment, multihost

THREE = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


def test_environment_decides():
    assert environment.settings({}) is None
    assert environment.settings(THREE) == {
        "coordinator_address": "host:1234",
        "num_processes": 2,
        "process_id": 1,
    }
    assert environment.settings({**THREE, "HYPERLORA_DISTRIBUTED": "0"}) is None
    assert environment.settings({"HYPERLORA_DISTRIBUTED": "1"}) == {}
    assert environment.settings({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    assert environment.settings({"TPU_WORKER_HOSTNAMES": "a"}) is None
    assert environment.settings({"MEGASCALE_NUM_SLICES": "2"}) == {}
    assert environment.settings({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "16"}) == {}
    assert environment.settings({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": "2"}, r"JAX_PROCESS_ID=2: expected 0..1"),
        ({"JAX_PROCESS_ID": "x"}, "expected integers"),
        ({"JAX_PROCESS_ID": ""}, "but not JAX_PROCESS_ID"),
    ],
)
def test_bad_environment(change, message):
    with pytest.raises(UserError, match=message):
        environment.settings({**THREE, **change})


def test_alone_everything_is_local():
    assert multihost.agree("name", "value") == "value"
    assert multihost.announced_steps() == {}
    multihost.barrier("name")


def test_a_worker_that_never_arrives_ends_the_others_with_the_reason():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from hyperlora_jax.parallel import multihost; multihost.start(timeout_seconds=4)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            **THREE,
            "JAX_PLATFORMS": "cpu",
            "JAX_PROCESS_ID": "0",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGABRT
    assert "process 0 of 2" in done.stderr
    assert "not all processes arrived" in done.stderr
