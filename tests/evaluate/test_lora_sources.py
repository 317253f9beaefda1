"""Every method's LoRAs, from a small dataset in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.evaluate import method_loras
from hyperlora_jax.evaluate.method_loras import BASELINE_NAMES, Context, make_source
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, validate

SPEC = LoraSpec((LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", 6, 8, 2, "linear"),))


class MeanColour:
    """Encoder: the pictures' mean colour, and one token of it."""

    name, embedding_dim, hash = "colour", 3, "c"
    image_size, num_tokens = (8, 8), 1

    def encode(self, images):
        pooled = jnp.asarray(images).mean(axis=(1, 2))
        return pooled, pooled[:, None]


@pytest.fixture(name="context", scope="module")
def _context(test_set):
    random = np.random.default_rng(0)
    own = np.asarray(MeanColour().encode(test_set.references)[0])
    embeddings = np.concatenate([own, random.uniform(size=(6, 3)).astype(np.float32)])
    vectors = random.normal(size=(12, SPEC.num_parameters)).astype(np.float32)
    model = {"generator": "regression", "network": {"width": 8, "depth": 1, "num_heads": 2}}
    generator = build_generator(SPEC, model)
    given = Condition(jnp.ones((1, 3)), jnp.ones((1, 1, 3)))
    params = jax.jit(generator.init)(jax.random.key(0), given)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    hyper = Hypernetwork(generator, params, MeanColour(), {}, model)
    baseline = {"num_neighbours": 20, "num_components": 4}
    return Context(SPEC, hyper, vectors, embeddings, None, {"paper": hyper}, baseline)


def vectors_of(source, questions, guidance=1.0):
    lora = source.loras_of(questions, guidance)
    validate(lora, SPEC)
    return np.asarray(vectorize.flatten(jax.tree.map(jnp.asarray, lora), SPEC))


@pytest.mark.parametrize("name", ["base", *BASELINE_NAMES, "generated", "shuffled", "paper"])
def test_one_lora_per_identity(name, context, test_set):
    source = make_source(name, context)
    found = vectors_of(source, test_set)
    assert found.shape == (6, SPEC.num_parameters)
    assert source.tuned == (name != "base")
    assert source.guided == (name in ("knn", "ridge"))


def test_the_first_views_tell_a_subject(context, test_set):
    alone = vectors_of(make_source("generated", context), test_set)
    source = make_source("generated_2", context)
    both = vectors_of(source, test_set)
    pairs = [[*own[:2]] for own in test_set.views]
    expected = context.hyper.generate(0, pairs, strength=1.0)
    expected = np.asarray(vectorize.flatten(expected, SPEC))
    np.testing.assert_allclose(both, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(both - alone).max() > 1e-4 and source.num_views == 2


def test_controls_are_what_they_say(context, test_set):
    nearest = vectors_of(make_source("nearest", context), test_set)
    np.testing.assert_allclose(nearest, context.vectors[:6], rtol=1e-5)
    copies = vectors_of(make_source("noisy_copy", context), test_set)
    distance = np.linalg.norm(copies - nearest, axis=1)
    wanted = 0.5 * method_loras.median_nearest_distance(context.vectors)
    np.testing.assert_allclose(distance, wanted, rtol=0.4)
    generated = vectors_of(make_source("generated", context), test_set)
    shuffled = vectors_of(make_source("shuffled", context), test_set)
    np.testing.assert_allclose(shuffled, np.roll(generated, 1, axis=0), atol=1e-6)
    with pytest.raises(ValueError, match="method 'best' is unknown, expected one of base"):
        make_source("best", context)
