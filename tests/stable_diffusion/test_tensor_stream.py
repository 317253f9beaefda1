import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files.base_files import weight_files
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.parallel.sharding import REPLICATED_RULES
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights import directory
from hyperlora_jax.stable_diffusion.weights.families import SCHEDULER
from hyperlora_jax.stable_diffusion.weights.flax_trees import flax_to_torch, param_shapes
from hyperlora_jax.stable_diffusion.weights.tensor_stream import read_tensors, to_devices

from .conftest import tiny_unet_config

SCRIPT = Path(__file__).parent / "loading_memory.py"


def write_unet(root, **changes):
    """A float32 base of nothing but a UNet of random numbers."""
    config = tiny_unet_config(**changes)
    unet = unet_from_config(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), param_shapes(unet)
    )
    directory.write_component(root / "unet", "unet", config, params, "float32")
    directory.write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
    return params


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_unet(root / "small")
    write_unet(root / "large", block_out_channels=[256, 512], layers_per_block=3)
    size = sum(path.stat().st_size for path in (root / "large").rglob("*.safetensors"))
    assert size > 250e6
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "dtype, axes", [("float32", "1,1,1"), ("bfloat16", "1,1,1"), ("bfloat16", "1,8,1")]
)
def test_peak_memory_is_that_of_the_largest_component(models, dtype, axes):
    devices = math.prod(int(axis) for axis in axes.split(","))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(models / "small"), str(models / "large"), dtype, axes],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout)
    largest = max(record["sizes"].values())
    # On a CPU the devices' memory is the host's: the model itself is in what has grown.
    assert 0.9 * largest < record["grown"] <= 1.3 * largest
    assert record["held"] < 1.1 * largest
    assert record["spread"] > 0.9 * largest if devices > 1 else record["spread"] == 0


def test_parameters_arrive_where_the_table_says(tmp_path):
    params = write_unet(tmp_path)
    mesh = make_mesh(1, 1, 1)
    for rules in ({}, {"rules": REPLICATED_RULES}):
        sd = StableDiffusion.from_pretrained(tmp_path, jnp.bfloat16, mesh=mesh, **rules)
        assert sd.unet.mesh == mesh
        for ours, given in zip(
            jax.tree.leaves(sd.params["unet"]), jax.tree.leaves(params), strict=True
        ):
            np.testing.assert_array_equal(ours, given.astype(jnp.bfloat16))
            assert ours.sharding.mesh == mesh


def test_every_dtype_of_a_file_is_read(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        str(np.dtype(dtype)): rng.standard_normal((3, 4)).astype(dtype)
        for dtype in (np.float32, np.float16, jnp.bfloat16, np.float64)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = {name: load() for name, load in read_tensors([tmp_path / "a.safetensors"])}
    assert set(found) == set(tensors)
    for name, array in found.items():
        assert array.dtype == tensors[name].dtype
        np.testing.assert_array_equal(array, tensors[name])
        placed = to_devices({"x": array}, jnp.float32)(("x",), array.T)
        np.testing.assert_array_equal(placed, tensors[name].T.astype(np.float32))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": np.ones((4, 4), np.float32)}, path)
    ((_, load),) = read_tensors([path])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"a\.safetensors: cut off: 56 of 64 bytes"):
        load()


def test_hash_does_not_depend_on_the_order_of_files(tmp_path):
    params = write_unet(tmp_path)
    tensors = flax_to_torch(params)
    names = list(tensors)
    for file, part in (("b", names[::2]), ("a", names[1::2])):
        save_file({n: tensors[n] for n in part}, tmp_path / f"{file}.safetensors")
    split = directory.hash_of_files([tmp_path / "b.safetensors", tmp_path / "a.safetensors"])
    whole = weight_files(tmp_path / "unet", "unet")
    assert split == directory.hash_of_files(whole) == directory.hash_of_params(params)
