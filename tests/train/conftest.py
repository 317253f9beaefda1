import os
import pathlib
import subprocess
import sys

import jax
import pytest

from hyperlora_jax.parallel import compilation_cache

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))  # for toy_task


@pytest.fixture(autouse=True, scope="module")
def compiled_programs(tmp_path_factory):
    """The toy step is compiled once for all tests of a module."""
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.enable(str(tmp_path_factory.mktemp("xla")), min_compile_seconds=0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def start_toy():
    """Starts toy_task.py in a process of its own with some simulated devices."""

    def start(*arguments, devices=1, environment=None):
        settings = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ["XLA_FLAGS"]
            + f" --xla_force_host_platform_device_count={devices}"
            + " --xla_cpu_collective_call_terminate_timeout_seconds=300",
            **(environment or {}),
        }
        return subprocess.Popen(
            [sys.executable, str(HERE / "toy_task.py"), *map(str, arguments)],
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run_toy(start_toy):
    """Runs toy_task.py to its end."""

    def run(*arguments, devices=1, check=True, timeout=150, environment=None):
        process = start_toy(*arguments, devices=devices, environment=environment)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert not check or process.returncode == 0, err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run
