import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.lora import factors, gauge, losses
from tests.lora.test_factors import deltas


@pytest.mark.parametrize("num", [None, 3])
def test_gram_forms_equal_dense_deltas(spec, random_lora, num):
    a, b = random_lora(num, 0), random_lora(num, 1)
    first, second = deltas(a, spec), deltas(b, spec)
    lead = 0 if num is None else 1

    def total(function):
        return sum(function(first[n], second[n]).sum(axis=tuple(range(lead, first[n].ndim)))
                   for n in first)  # fmt: skip

    inner, error = total(lambda x, y: x * y), total(lambda x, y: (x - y) ** 2)
    norm = total(lambda x, y: y**2)
    np.testing.assert_allclose(losses.delta_inner(a, b), inner, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(losses.delta_error(a, b), error, rtol=1e-4)
    np.testing.assert_allclose(losses.relative_delta_error(a, b), np.sqrt(error / norm), rtol=1e-4)
    cosine = inner / np.sqrt(norm * total(lambda x, y: x**2))
    np.testing.assert_allclose(losses.delta_cosine(a, b), cosine, rtol=1e-3, atol=1e-5)
    assert losses.delta_error(a, b).shape == (() if num is None else (num,))


def test_ranks_may_differ(spec, random_lora):
    lora = random_lora(2)
    wide = gauge.pad_rank(lora, 4)
    np.testing.assert_allclose(losses.delta_cosine(wide, lora), 1, atol=1e-5)
    assert (np.abs(losses.delta_error(wide, lora)) < 1e-2).all()


def test_close_deltas_keep_their_digits(random_lora):
    a = random_lora()
    b = jax.tree.map(lambda leaf: leaf * np.float32(1 + 1e-4), a)
    assert float(losses.delta_error(a, a)) == 0
    norm = float(losses.delta_inner(a, a))
    assert abs(float(losses.delta_error(b, a)) / norm - 4e-8) < 1e-9


def test_whitened_error_weighs_matrices_alike(random_lora):
    batch = random_lora(8)
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), batch)
    spread = jax.tree.map(lambda leaf, m: jnp.sqrt(jnp.mean((leaf - m) ** 2)), batch, mean)
    error = losses.whitened_error(factors.repeat(mean, 8), batch, spread)
    assert error.shape == (8,)
    assert abs(float(error.mean()) - 1) < 1e-4
    assert (losses.whitened_error(batch, batch, spread) == 0).all()
    single = losses.whitened_error(mean, factors.index(batch, 0), spread)
    np.testing.assert_allclose(single, error[0], rtol=1e-5)


def test_gradients_are_finite_at_zero(spec):
    lora = factors.init(jax.random.key(0), spec, 2)
    target = jax.tree.map(jnp.ones_like, lora)
    gradient = jax.grad(lambda tree: losses.delta_error(tree, target).sum())(lora)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), gradient))
    assert any(bool(leaf.any()) for leaf in jax.tree.leaves(gradient))
