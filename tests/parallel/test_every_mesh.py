"""Every factorisation of data × fsdp × tensor on every slice by name, as libtpu describes it."""

import contextlib

import numpy as np
import pytest
from jax.experimental import mesh_utils

from hyperlora_jax.aot import ahead_of_time
from hyperlora_jax.batches.pipelines import array_batches
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import sharding
from hyperlora_jax.parallel.topology import GRIDS_2D, parse

FLAT = [f"{chip}-{size}" for chip in ("v5e", "v6e") for size in GRIDS_2D]
CUBES = [f"{chip}-{2**k}" for chip in ("v4", "v5p") for k in range(3, 11)]
CUBES += [f"tpu7x-{2**k}" for k in range(2, 9)]
SEVERAL = ["2xv5e-1", "2xv5e-4", "2xv5e-16", "3xv5e-16", "2xv5e-256", "4xv6e-16", "2xv6e-256"]
SEVERAL += ["2xv4-32", "2xv5p-32", "2xv5p-128", "2xtpu7x-32"]
EXAMPLES = np.arange(1000)


def divisors(number):
    return [k for k in range(1, number + 1) if number % k == 0]


def meshes(name):
    """(data, fsdp, tensor) of all factorisations of a slice's devices, and their mesh."""
    topology = parse(name)
    count = topology.num_devices
    for fsdp in divisors(count):
        for tensor in divisors(count // fsdp):
            data = count // fsdp // tensor
            if data % topology.num_slices:
                with pytest.raises(UserError, match=f"multiple of the {topology.num_slices} sl"):
                    ahead_of_time.topology_mesh(topology, data, fsdp, tensor)
            else:
                yield ahead_of_time.topology_mesh(topology, data, fsdp, tensor)


def by_whole_axes(mesh, num_slices):
    """JAX's grid of the same devices where every axis is one or more axes of the torus."""
    devices, shape = [*mesh.devices.flat], (*mesh.shape.values(),)
    devices.sort(key=lambda device: device.id)
    if num_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices)
    within, between = (shape[0] // num_slices, *shape[1:]), (num_slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices)


@pytest.fixture(autouse=True)
def without_a_tpu(monkeypatch):
    pytest.importorskip("libtpu")
    for name, value in ahead_of_time.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", [*FLAT, *CUBES, *SEVERAL])
def test_every_mesh_is_built_and_every_host_reads_its_rows(name):
    built = whole = 0
    for mesh in meshes(name):
        built += 1
        assert len({device.id for device in mesh.devices.flat}) == parse(name).num_devices
        # Two examples a device: which they are by the place of every device in the mesh.
        batch = 2 * mesh.shape["data"] * mesh.shape["fsdp"]
        expected: dict[int, set[int]] = {}
        for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
            row = 2 * (data * mesh.shape["fsdp"] + fsdp)
            expected.setdefault(device.process_index, set()).update((row, row + 1))
        rows = sharding.process_rows(mesh, batch)
        assert {process: own.tolist() for process, own in rows.items()} == {
            process: sorted(own) for process, own in expected.items()
        }
        np.testing.assert_array_equal(np.unique(np.concatenate([*rows.values()])), np.arange(batch))
        # What needs no axis split keeps the order that JAX gives it.
        with contextlib.suppress(NotImplementedError):
            np.testing.assert_array_equal(mesh.devices, by_whole_axes(mesh, parse(name).num_slices))
            whole += 1
    assert built >= whole >= min(built, 6)


@pytest.mark.parametrize(
    ("name", "fsdp", "tensor"), [("v5e-16", 1, 1), ("2xv5e-16", 2, 2), ("v4-32", 8, 2)]
)
def test_hosts_together_load_the_batch_of_a_single_one(name, fsdp, tensor):
    mesh = ahead_of_time.topology_mesh(parse(name), -1, fsdp, tensor)
    whole, parts = next(array_batches({"x": EXAMPLES}, 64, seed=0)), np.zeros(64)
    hosts = sharding.process_rows(mesh, 64)
    assert any((np.diff(rows) > 1).any() for rows in hosts.values())
    for rows in hosts.values():
        parts[rows] = next(array_batches({"x": EXAMPLES}, 64, 0, rows))["x"]
    np.testing.assert_array_equal(parts, whole["x"])


def test_several_slices_stay_outermost_where_an_axis_is_split():
    mesh = ahead_of_time.topology_mesh(parse("2xv5e-16"), fsdp=2)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices[:8] == 0).all() and (slices[8:] == 1).all()
