"""Settings of every test process; they must be made before JAX is imported."""

import os
import socket

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Tests are small: compiling fast matters more than running fast (8 times less compile time).
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()


@pytest.fixture(scope="session")
def as_hosts():
    """Makes the environment variables of several processes that shall run as one."""

    def environments(count=2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        return [{**shared, "JAX_PROCESS_ID": str(index)} for index in range(count)]

    return environments
