"""Settings of every test process; they must be made before JAX is imported."""

import gc
import os
import socket

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by two workers
# Tests are small: compiling fast matters more than running fast. No optimisation compiles 8 times
# faster, older emitters of fused loops than today's 1.6 times.
for flag in ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"):
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
# Several processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(20_000)  # as the program itself does


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
