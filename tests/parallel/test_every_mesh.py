"""Every factorisation of data × fsdp × tensor on every slice by name, as libtpu describes it."""

import collections
import contextlib

import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding

from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import sharding
from hyperlora_jax.parallel.topology import GRIDS_2D, parse
from hyperlora_jax.train import ahead_of_time

FLAT = [f"{chip}-{size}" for chip in ("v5e", "v6e") for size in GRIDS_2D]
CUBES = [f"{chip}-{2**k}" for chip in ("v4", "v5p") for k in range(3, 11)]
CUBES += [f"tpu7x-{2**k}" for k in range(2, 9)]
SEVERAL = ["2xv5e-1", "2xv5e-4", "2xv5e-16", "3xv5e-16", "2xv5e-256", "4xv6e-16", "2xv6e-256"]
SEVERAL += ["2xv4-32", "2xv5p-32", "2xv5p-128", "2xtpu7x-32"]


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
        rows = sharding.host_rows(mesh)
        # By JAX's own account of which rows of a batch lie on which device.
        batch = mesh.shape["data"] * mesh.shape["fsdp"]
        placed = NamedSharding(mesh, sharding.batch_sharding(mesh).spec).devices_indices_map(
            (batch,)
        )
        expected = collections.defaultdict(set)
        for device, (part,) in placed.items():
            expected[device.process_index] |= set(range(batch)[part])
        assert {process: set(own) for process, own in rows.items()} == expected
        parts = set(rows.values())
        assert len({len(part) for part in parts}) == 1
        assert sorted(np.concatenate([*parts])) == list(range(batch))
        # What needs no axis split keeps the order that JAX gives it.
        with contextlib.suppress(NotImplementedError):
            np.testing.assert_array_equal(mesh.devices, by_whole_axes(mesh, parse(name).num_slices))
            whole += 1
    assert built >= whole >= min(built, 6)


def test_several_slices_stay_outermost_where_an_axis_is_split():
    mesh = ahead_of_time.topology_mesh(parse("2xv5e-16"), fsdp=2)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices[:8] == 0).all() and (slices[8:] == 1).all()
