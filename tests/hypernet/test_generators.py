"""All generators behind the Protocol: they start, learn from one batch and sample."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet import generators
from hyperlora_jax.hypernet.backbone import Attention
from hyperlora_jax.hypernet.building import GENERATORS, TRAINED, build_generator
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.hypernet.generators import Draw, Generator
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, validate

SPEC = LoraSpec(
    (
        LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", 8, 8, 2, "linear"),
        LoraSite("down_blocks.0.attentions.0.proj.attn2.to_k", 6, 8, 2, "linear"),
    )
)
DIM = SPEC.num_parameters
MODEL = {
    "network": {"width": 16, "depth": 1, "num_heads": 2, "up_scale": 1.0},
    "mlp": {"width": 32, "num_stages": 2, "blocks_per_stage": 1, "conditioning": "adalora"},
    "vae": {"latent_dim": 6, "width": 16, "depth": 1},
    "baseline": {"num_neighbours": 2, "num_components": 4},
    "diffusion": {"num_train_timesteps": 50},
    "num_iterations": 2,
}


@pytest.fixture(name="data", scope="module")
def _data():
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(8, 5)).astype(np.float32)
    vectors = embeddings @ random.normal(size=(5, DIM)).astype(np.float32)
    tokens = jnp.asarray(random.normal(size=(8, 3, 5)), jnp.float32)
    return Condition(jnp.asarray(embeddings), tokens), vectors


def constants_of(generator, vectors, embeddings):
    if hasattr(generator, "fit"):
        return generator.fit(np.asarray(embeddings), vectors)
    found = {"mean": vectors.mean(axis=0), "std": np.full(2 * len(SPEC), vectors.std())}
    codec = getattr(generator, "codec", None)
    if hasattr(codec, "vae"):
        key = jax.random.key(7)
        found["vae"] = jax.jit(codec.vae.init)(key, jnp.asarray(vectors), key)["params"]
        found |= {"latent_mean": np.zeros(6, np.float32), "latent_std": np.ones(6, np.float32)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), found)


@pytest.mark.parametrize("kind", GENERATORS)
def test_every_generator_samples(kind, data):
    condition, vectors = data
    generator = build_generator(SPEC, {**MODEL, "generator": kind})
    assert isinstance(generator, Generator)
    constants = constants_of(generator, vectors, condition.pooled)
    params = jax.jit(generator.init)(jax.random.key(0), condition)
    # As after some training: an untrained network predicts zeros, whatever it starts from.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params, draw = jax.tree.unflatten(tree, leaves), Draw(num_steps=3)

    @jax.jit
    def sample(key):
        return generator.sample(params, constants, condition, key, draw)

    first, second = sample(jax.random.key(1)), sample(jax.random.key(2))
    validate(first, SPEC)
    change = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
    assert (change > 0) == generator.stochastic


@pytest.mark.parametrize(
    ("denoiser", "prediction"), [("tokens", "v"), ("tokens", "flow"), ("mlp", "x0")]
)
def test_diffusion_learns_what_the_condition_says(prediction, denoiser, data):
    condition, vectors = data
    settings = {"prediction": prediction, "num_train_timesteps": 50, "denoiser": denoiser}
    model = {**MODEL, "generator": "diffusion", "diffusion": settings, "condition_dropout": 0.1}
    generator = build_generator(SPEC, model)
    constants = constants_of(generator, vectors, condition.pooled)
    params = jax.jit(generator.init)(jax.random.key(0), condition)
    optimizer = optax.adam(5e-3)
    target = jnp.asarray(vectors)

    @jax.jit
    def step(carry, key):
        params, state = carry

        def loss(params):
            estimate = generator.train(params, constants, condition, target, key)
            return estimate.losses["diffusion"].mean()

        grads = jax.grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), 600)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)

    def error(guidance):
        draw = Draw(guidance=guidance, num_steps=20)
        sample = jax.jit(lambda key: generator.sample(params, constants, condition, key, draw))
        lora = sample(jax.random.key(3))
        ours = vectorize.flatten(lora, SPEC)
        return float(jnp.mean((ours - target) ** 2) / jnp.mean((target - target.mean(0)) ** 2))

    assert error(1.0) < 0.5
    assert error(0.0) > 2 * error(1.0), "without the condition it should not know who is who"


@pytest.mark.parametrize("kind", ["regression", "iterative"])
def test_guidance_needs_condition_dropout(kind, data):
    condition, _ = data
    generator = build_generator(SPEC, {**MODEL, "generator": kind})
    params = jax.jit(generator.init)(jax.random.key(0), condition)
    with pytest.raises(UserError, match="trained with condition_dropout = 0"):
        generator.sample(params, {}, condition, jax.random.key(0), Draw(guidance=2.0))


def test_iterations_see_the_last_answer(data):
    condition, _ = data
    once = build_generator(SPEC, {**MODEL, "generator": "iterative", "num_iterations": 1})
    twice = build_generator(SPEC, {**MODEL, "generator": "iterative", "num_iterations": 2})
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape),
        jax.jit(once.init)(jax.random.key(0), condition),
    )

    def answer(generator):
        write = jax.jit(lambda key: generator.train(params, {}, condition, None, key).lora)
        return vectorize.flatten(write(jax.random.key(0)), SPEC)

    assert float(jnp.abs(answer(once) - answer(twice)).max()) > 1e-4


def test_errors_name_the_config():
    with pytest.raises(UserError, match="got 'gan', expected one of regression"):
        build_generator(SPEC, {"generator": "gan"})
    with pytest.raises(UserError, match="prediction is 'eps'"):
        build_generator(SPEC, {"generator": "diffusion", "diffusion": {"prediction": "eps"}})
    with pytest.raises(UserError, match="condition_dropout is 1"):
        build_generator(SPEC, {"generator": "regression", "condition_dropout": 1.0})
    assert set(TRAINED) < set(GENERATORS)


def test_many_conditions_are_written_in_slices_of_equal_size(monkeypatch):
    monkeypatch.setattr(generators, "SLICE", 4)
    seen = []

    def function(condition):
        seen.append(condition.pooled.shape)
        return {"sum": condition.pooled + condition.tokens.sum(axis=1)}

    tokens = jnp.arange(9 * 2 * 3.0).reshape(9, 2, 3)
    condition = Condition(jnp.arange(27.0).reshape(9, 3), tokens)
    written = generators.in_slices(function)(condition)
    np.testing.assert_array_equal(written["sum"], function(condition)["sum"])
    assert seen[0] == (3, 3)


@pytest.mark.parametrize("length", [1, 6])  # folded into the queries and the output, and not
def test_attention_equals_its_formula(length):
    random = np.random.default_rng(length)
    x = jnp.asarray(random.normal(size=(2, 5, 8)), jnp.float32)
    context = jnp.asarray(random.normal(size=(2, length, 8)), jnp.float32)
    mask = jnp.arange(length)[None] < jnp.array([[1], [length]])
    module = Attention(num_heads=2)
    params = module.init(jax.random.key(0), x, context)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # biases are zero at first

    def projected(name, values):
        weights = params[name]
        return jnp.einsum("lnc,chd->lnhd", values, weights["kernel"]) + weights["bias"]

    mixed = jax.nn.dot_product_attention(
        projected("query", x), projected("key", context), projected("value", context),
        mask=mask[:, None, None],
    )  # fmt: skip
    out = params["out"]
    expected = jnp.einsum("lnhd,hdc->lnc", mixed, out["kernel"]) + out["bias"]
    answer = module.apply({"params": params}, x, context, mask)
    np.testing.assert_allclose(answer, expected, atol=2e-6)
