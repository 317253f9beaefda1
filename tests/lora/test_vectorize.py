import jax
import numpy as np
import pytest

from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import site_factors


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("num", [None, 1, 3])
def test_round_trips_are_exact(spec, random_lora, num):
    lora = random_lora(num)
    vector = vectorize.flatten(lora, spec)
    assert vector.shape == ((spec.num_parameters,) if num is None else (num, spec.num_parameters))
    assert_same(vectorize.unflatten(vector, spec), lora)


def test_the_flat_order_is_that_of_sorted_peft_keys(spec, random_lora):
    lora = random_lora()
    state = {}
    for site in spec:
        pair = site_factors(lora, site)
        name = f"base_model.model.{site.path}"
        order = (1, 0) if site.kind == "linear" else (3, 2, 0, 1)
        state[f"{name}.lora_A.weight"] = pair["down"].transpose(order)
        state[f"{name}.lora_B.weight"] = pair["up"].T
    wanted = np.concatenate([state[name].ravel() for name in sorted(state)])
    np.testing.assert_array_equal(vectorize.flatten(lora, spec), wanted)


def test_wrong_sizes_are_refused(spec):
    with pytest.raises(ValueError, match="5 numbers, spec has"):
        vectorize.unflatten(np.zeros(5, np.float32), spec)


def test_whitened_loras_have_mean_zero_and_unit_spread(spec, random_lora):
    lora = random_lora(16)
    stats = vectorize.whitening(lora)
    white = vectorize.whiten(lora, stats)
    for leaf in jax.tree.leaves(white):
        assert abs(float(leaf.std()) - 1) < 1e-3
        np.testing.assert_allclose(leaf.mean(0), 0, atol=1e-5)
    same = vectorize.whitening(factors.repeat(factors.index(lora, 0), 4))
    assert all(float(std) == 1.0 for std in jax.tree.leaves(same.std))
