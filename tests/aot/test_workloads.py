"""The 1 B configuration on weights2weights tokens: its size, and that it fits a small slice."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from hyperlora_jax.aot.workloads import config_workload
from hyperlora_jax.cli.config import load_config
from hyperlora_jax.lora.sites import spec_from_shapes

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "w2w_1b.py"


def test_a_thousand_million_parameters_on_w2w_tokens():
    workload = config_workload(load_config(CONFIG))
    shapes = jax.eval_shape(workload.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert 1.0e9 < count < 1.2e9
    batch = workload.batch(32)
    assert batch["target"].shape == (32, 99_648)
    assert "unet" not in workload.frozen, "weight space only: the base is not needed"


def test_three_hundred_million_parameters_through_stable_diffusion():
    workload = config_workload(load_config(CONFIG.with_name("sd15.py")))
    shapes = jax.eval_shape(workload.init, jax.random.key(0))
    assert 3.0e8 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 3.2e8
    assert {leaf.dtype.name for leaf in jax.tree.leaves(workload.frozen["unet"])} == {"bfloat16"}
    assert workload.batch(16)["latents"].shape == (16, 1, 64, 64, 4)


@pytest.mark.slow
def test_sdxl_is_traced_with_its_added_conditions():
    workload = config_workload(load_config(CONFIG.with_name("sdxl.py")))
    params = jax.eval_shape(workload.init, jax.random.key(0))
    weights = workload.frozen["unet"]
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == 2_567_463_684
    spec = spec_from_shapes(weights, "attn-qkvo", 8)
    assert (len(spec), spec.num_parameters) == (560, 11_612_160)
    assert {name: rows.shape[2:] for name, rows in workload.batch(2)["text"].items()} == {
        "states": (77, 2048),
        "pooled": (1280,),
        "time_ids": (6,),
    }
    losses, _ = jax.eval_shape(
        workload.loss, params, workload.frozen, workload.batch(2), jax.random.key(0)
    )
    assert losses.shape == (2,)


@pytest.mark.slow
def test_fits_sixteen_v5e_chips(tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "record.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "hyperlora_jax.cli.main", "compile", "--config", str(CONFIG)),
            *("--topology", "v5e-16", "--effort", "low", "--json", str(out)),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=CONFIG.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())[0]
    assert record["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
    assert record["bytes"]["peak"] < record["bytes"]["limit"]
    # Sharded, not replicated: a replica of parameters, average and moments alone is 17 GB.
    assert record["bytes"]["arguments"] < 4e9
