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
def run_toy():
    """Runs toy_task.py in a process of its own with some simulated devices."""

    def run(*arguments, devices=1, check=True, timeout=120):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
            " --xla_cpu_collective_call_terminate_timeout_seconds=300",
        }
        done = subprocess.run(
            [sys.executable, str(HERE / "toy_task.py"), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run
