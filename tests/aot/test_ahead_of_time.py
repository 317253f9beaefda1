import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from hyperlora_jax.aot.ahead_of_time import roofline
from hyperlora_jax.aot.compile_search import largest_batch
from hyperlora_jax.parallel.topology import parse
from hyperlora_jax.train.flop_count import flops

NUM_PARAMS = 512 * 1024 * 2 + 8 * 512 * 512


def compile_toy(*slices):
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).parent / "compile_toy.py"), *slices],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(record, chips):
    assert record["chips"] == chips
    assert record["fits"]
    assert record["bytes"]["peak"] < record["bytes"]["limit"]
    assert record["step_seconds_estimate"] > 0


@pytest.mark.slow
def test_other_chips():
    pytest.importorskip("libtpu")
    for record in compile_toy("v5p-8", "v6e-4,1,2,2"):
        check(record, 4)


def test_one_step_for_many_slices():
    pytest.importorskip("libtpu")
    plain, sharded, two, searched = compile_toy(
        "v5e:2x2", "v5e:2x2,1,4", "2xv5e-4,2,4", "search-v5e-4"
    )
    for record, chips in ((plain, 4), (sharded, 4), (two, 8)):
        check(record, chips)
    # Data parallel: the gradients are reduced once; nothing else moves (the base is replicated).
    gradients = plain["collective_bytes"]["all-reduce"]["data"]
    assert 4 * NUM_PARAMS <= gradients <= 1.05 * 4 * NUM_PARAMS
    assert list(plain["collective_bytes"]) == ["all-reduce"]
    assert sharded["bytes"]["arguments"] < 0.4 * plain["bytes"]["arguments"]
    # Two slices: only what one slice has already reduced crosses the network.
    crossing = two["collective_bytes"]["all-reduce"]["slices"]
    assert NUM_PARAMS <= crossing <= 1.15 * NUM_PARAMS  # 4 bytes × parameters ÷ fsdp of 4
    # 6 FLOPs per weight and example, less the gradient of the first input; the base: 4.
    assert plain["flops_per_chip"] == pytest.approx(64 * (6 * NUM_PARAMS + 4 * 2**18), rel=0.2)
    assert searched["batch_per_chip"] == 4
    assert searched["effort"] == "low"


def test_one_chip_and_an_axis_that_splits_the_torus():
    pytest.importorskip("libtpu")
    one, split = compile_toy("v5e-1", "v6e-16,2,8")
    assert (one["chips"], one["collective_bytes"]) == (1, {})
    assert split["mesh"] == {"data": 2, "fsdp": 8, "tensor": 1}
    assert one["fits"] and split["fits"]
    assert split["bytes"]["arguments"] < one["bytes"]["arguments"]


def test_flops_of_loops_and_convolutions():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert flops(loop, jnp.zeros((2, 8)), jnp.zeros((5, 8, 8))) == 5 * 2 * 2 * 8 * 8

    def convolve(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    image, kernel = jnp.zeros((2, 6, 6, 4)), jnp.zeros((3, 3, 4, 8))
    assert flops(convolve, image, kernel) == 2 * (2 * 6 * 6 * 8) * (3 * 3 * 4)


def test_roofline_charges_slices_to_the_network():
    topology = parse("v5e-256")
    near = roofline(topology, 197e12, 0.0, {"all-reduce": {"data": 200e9}})
    assert near["compute"] == pytest.approx(1.0)
    assert near["step"] == pytest.approx(2.0)
    far = roofline(topology, 197e12, 0.0, {"all-reduce": {"slices": 3.1e9}})
    assert far["network"] == pytest.approx(1.0)


@pytest.mark.parametrize("start", [1, 8, 64])
@pytest.mark.parametrize(("capacity", "found"), [(0, 0), (1, 1), (5, 4), (13, 12), (1000, 64)])
def test_largest_batch(capacity, found, start):
    assert largest_batch(lambda size: size <= capacity, limit=64, start=start) == found


def test_a_good_start_saves_trials():
    tried = []
    assert largest_batch(lambda size: not tried.append(size) and size <= 16, 24, start=16) == 16
    assert tried == [16, 24]
