"""Tiny hypernetworks of every kind, with weights that matter."""

import functools

import jax
import numpy as np
import pytest

from hyperlora_jax.encoders import condition_encoders
from hyperlora_jax.encoders.image_encoder import ConvEncoder, init_encoder
from hyperlora_jax.hypernet import familiarity
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora.sites import LoraSite, LoraSpec

BLOCK = "down_blocks.0.attentions.0."
SPEC = LoraSpec(
    (
        LoraSite(BLOCK + "transformer_blocks.0.attn1.to_q", 32, 32, 2),
        LoraSite(BLOCK + "transformer_blocks.0.attn2.to_k", 24, 32, 2),
        LoraSite("down_blocks.0.resnets.0.conv1", 32, 32, 3, "conv", (3, 3)),
    )
)
NETWORK = {"width": 16, "depth": 2, "num_heads": 2, "up_scale": 1.0, "components_per_token": 1}
MODEL = {
    "network": NETWORK,
    "mlp": {"width": 32, "num_stages": 2, "blocks_per_stage": 1},
    "vae": {"latent_dim": 6, "width": 16, "depth": 2},
    "baseline": {"num_neighbours": 2, "num_components": 4},
    "diffusion": {"num_train_timesteps": 50},
    "num_iterations": 3,
    "condition_dropout": 0.1,
}


def trained(init, *arguments, seed=9):
    """Parameters as after some training: nothing is zero. numpy draws, as it compiles nothing."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = 0.25 if leaf.ndim > 1 else 0.1
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jax.numpy.asarray(random.normal(mean, spread, leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, *arguments))


def conv_encoder():
    module = ConvEncoder(image_size=16, widths=(8, 8, 16), embedding_dim=8, pool_channels=4)
    init = functools.partial(init_encoder, module)
    params = jax.device_get(trained(init, jax.random.key(3), seed=2))  # tells our pictures apart
    return condition_encoders.FlaxImageEncoder(
        "e", module, params, condition_encoders.tree_hash(params)
    )


def hypernetwork(kind, encoder=None, spec=SPEC, facts=None, **model):
    """A hypernetwork of this kind; `model` changes sections of its config."""
    encoder = encoder or conv_encoder()
    model = {name: {**own, **model.get(name, {})} if isinstance(own, dict) else own
             for name, own in MODEL.items()} | {"generator": kind}  # fmt: skip
    generator, random = build_generator(spec, model), np.random.default_rng(0)
    width = encoder.embedding_dim
    embeddings = random.normal(size=(20, width)).astype(np.float32)
    vectors = random.normal(size=(20, spec.num_parameters)).astype(np.float32)
    params = {}
    if hasattr(generator, "fit"):
        constants = generator.fit(embeddings, vectors)
    else:
        tokens = np.zeros((1, 2, width), np.float32)
        condition = Condition(jax.numpy.asarray(embeddings[:1]), jax.numpy.asarray(tokens))
        params = trained(generator.init, jax.random.key(0), condition)
        constants = _constants(generator, vectors)
    known = familiarity.fit(embeddings, embeddings[::-1])
    facts = {"base_hash": "b" * 64, "base": "x", "family": "sd1", "default_strength": 1.5,
             "generate": {"num_steps": 4}} | (facts or {})  # fmt: skip
    constants = {**constants, "familiarity": known}
    return Hypernetwork(generator, params, encoder, facts, model, constants)


def _constants(generator, vectors):
    if not generator.needs_targets:
        return {}
    random = np.random.default_rng(1)
    std = random.uniform(0.5, 2, 2 * len(generator.spec)).astype(np.float32)
    found = {"mean": vectors.mean(axis=0), "std": std}
    vae = getattr(generator.codec, "vae", None)
    if vae is not None:
        key = jax.random.key(7)
        found["vae"] = trained(vae.init, key, jax.numpy.asarray(vectors), key)["params"]
        found["latent_mean"] = random.normal(size=vae.latent_dim).astype(np.float32)
        found["latent_std"] = random.uniform(0.5, 2, vae.latent_dim).astype(np.float32)
    return jax.tree.map(jax.numpy.asarray, found)


@pytest.fixture(scope="session")
def pictures():
    """Of two subjects two each, [2, 2, 16, 16, 3]."""
    pixels = np.random.default_rng(5).integers(0, 256, (2, 2, 16, 16, 3), np.uint8)
    return np.float32(pixels) / np.float32(255)
