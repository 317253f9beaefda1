import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.lora import vectorize
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


def test_spread_of_factors_is_that_of_their_numbers(spec):
    std = np.arange(1.0, 2 * len(spec) + 1, dtype=np.float32)
    elements = vectorize.element_spread(std, spec)
    tree = vectorize.spread_tree(std, spec)
    ones = vectorize.unflatten(np.ones(spec.num_parameters, np.float32), spec)
    assert_same(
        vectorize.flatten(jax.tree.map(jnp.multiply, ones, tree), spec), np.asarray(elements)
    )
