"""One device per core and XLA's own products, unless the environment says otherwise."""

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


PRODUCT = """
from hyperlora_jax.parallel import cpu_devices
cpu_devices.prepare()
import jax, jax.numpy as jnp
x = jnp.ones((4, 16, 32))
print("ynn" in jax.jit(lambda x, w: x @ w).lower(x, jnp.ones((32, 32))).compile().as_text())
"""


@pytest.mark.parametrize(
    ("flags", "found"), [("", "False"), (f"{cpu_devices.YNN}=LIBRARY_FUSION_TYPE_DOT", "True")]
)
def test_small_products_are_xla_s_own_unless_told_otherwise(flags, found):
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", PRODUCT]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == found


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
