"""One device per core, unless the environment says otherwise."""

import subprocess
import sys

import jax
import pytest

from hyperlora_jax.parallel import cpu_devices

COUNT = """
import os
os.sched_getaffinity = lambda pid: set(range({cores}))
import jax
from hyperlora_jax.parallel import cpu_devices
cpu_devices.one_per_core()
print(jax.device_count())
"""


@pytest.mark.parametrize(("cores", "devices"), [(1, 1), (3, 2), (32, 8)])
def test_cores_become_devices(cores, devices):
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"}
    command = [sys.executable, "-c", COUNT.format(cores=cores)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(shown.stdout) == devices


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"},
        {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": "localhost:1234",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "0",
        },
    ],
)
def test_the_environment_goes_first(environment):
    before = jax.config.jax_num_cpu_devices
    assert cpu_devices.one_per_core(environment) is None
    assert jax.config.jax_num_cpu_devices == before
