"""Baselines against small closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.baselines import Mean, Neighbours, PcaGaussian, Ridge
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.hypernet.generators import Draw
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec

SPEC = LoraSpec(
    (
        LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", 5, 6, 2, "linear"),
        LoraSite("down_blocks.0.resnets.0.conv1", 2, 4, 2, "conv", (3, 3)),
    )
)
KEY = jax.random.key(0)


@pytest.fixture(name="data", scope="module")
def _data():
    random = np.random.default_rng(1)
    embeddings = random.normal(size=(40, 4)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    vectors = embeddings @ random.normal(size=(4, SPEC.num_parameters)).astype(np.float32)
    return embeddings, vectors


def predict(generator, constants, embeddings, guidance=1.0):
    condition = Condition(jnp.asarray(embeddings), jnp.asarray(embeddings)[:, None])
    constants = jax.tree.map(jnp.asarray, constants)
    lora = generator.sample({}, constants, condition, KEY, Draw(guidance=guidance))
    return np.asarray(vectorize.flatten(lora, SPEC))


def test_nearest_is_the_training_lora_itself(data):
    embeddings, vectors = data
    generator = Neighbours(SPEC)
    constants = generator.fit(embeddings, vectors)
    np.testing.assert_allclose(predict(generator, constants, 3 * embeddings), vectors, rtol=1e-5)
    mean = vectors.mean(axis=0)
    doubled = predict(generator, constants, embeddings, guidance=2.0)
    np.testing.assert_allclose(doubled, mean + 2 * (vectors - mean), rtol=1e-4, atol=1e-4)


def test_ridge_predicts_left_out_subjects_better_than_neighbours(data):
    embeddings, vectors = data
    noise = np.random.default_rng(2).normal(size=vectors.shape).astype(np.float32)
    known, asked = slice(0, 32), slice(32, 40)
    errors = {}
    for generator in (Ridge(SPEC), Neighbours(SPEC, "raw", 5), Mean(SPEC)):
        constants = generator.fit(embeddings[known], (vectors + 0.3 * noise)[known])
        guess = predict(generator, constants, embeddings[asked])
        errors[type(generator).__name__] = np.square(guess - vectors[asked]).mean()
    assert errors["Ridge"] < errors["Neighbours"] < 0.5 * errors["Mean"]


def test_ridge_penalty_grows_with_noise(data):
    embeddings, vectors = data
    noise = np.random.default_rng(3).normal(size=vectors.shape).astype(np.float32)
    clean = Ridge(SPEC).fit(embeddings, vectors)["penalty"]
    noisy = Ridge(SPEC).fit(embeddings, vectors + 5 * noise)["penalty"]
    assert clean < noisy


def test_delta_space_blends_deltas_not_factors(data):
    embeddings, _ = data
    one = factors.init(KEY, SPEC)
    one = jax.tree.map(lambda leaf: leaf + 0.1, one)
    # The same delta in two gauges: factor means would cancel, delta means must not.
    other = jax.tree.map(lambda leaf: -leaf, one)
    vectors = np.stack([np.asarray(vectorize.flatten(x, SPEC)) for x in (one, other)])
    generator = Neighbours(SPEC, "delta", 2, temperature=100.0)
    constants = jax.tree.map(jnp.asarray, generator.fit(embeddings[:2], vectors))
    condition = Condition(jnp.asarray(embeddings[2:4]), jnp.asarray(embeddings[2:4])[:, None])
    lora = generator.sample({}, constants, condition, KEY, Draw())
    for ours, wanted in zip(
        jax.tree.leaves(lora, is_leaf=factors.is_site),
        jax.tree.leaves(one, is_leaf=factors.is_site),
        strict=True,
    ):
        single = factors.index(ours, 0)
        np.testing.assert_allclose(factors.delta(single), factors.delta(wanted), atol=1e-5)


def test_pca_samples_have_the_training_spread(data):
    embeddings, vectors = data
    generator = PcaGaussian(SPEC, num_components=8)
    constants = generator.fit(embeddings, vectors)
    assert len(constants["spread"]) == 4, "four directions is all there are"
    drawn = predict(generator, constants, np.zeros((3000, 4), np.float32))
    np.testing.assert_allclose(drawn.mean(axis=0), vectors.mean(axis=0), atol=0.1)
    ratio = drawn.std(axis=0) / vectors.std(axis=0)
    assert abs(ratio.mean() - 1) < 0.05


def test_too_many_neighbours(data):
    with pytest.raises(UserError, match="got 99, expected 1 to the 40"):
        Neighbours(SPEC, "raw", 99).fit(*data)
