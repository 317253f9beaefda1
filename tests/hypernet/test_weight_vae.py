"""The VAE over LoRA vectors: learns a low-dimensional set, and latents are a codec."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperlora_jax.hypernet.weight_diffusion import Latents, WeightVae, vae_losses
from hyperlora_jax.lora.sites import LoraSite, LoraSpec

SPEC = LoraSpec((LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", 8, 8, 2, "linear"),))
VAE = WeightVae(SPEC.num_parameters, latent_dim=4, width=16, depth=1)


def test_reconstructs_and_its_latents_are_a_codec():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(64, 2)) @ random.normal(size=(2, SPEC.num_parameters))
    vectors = jnp.asarray(5.0 + 3.0 * vectors, jnp.float32)
    constants = {"mean": vectors.mean(axis=0), "std": jnp.full(2, vectors.std(axis=0).mean())}
    codec = Latents(SPEC, VAE)
    x = (vectors - constants["mean"]) / constants["std"][0]
    params = jax.jit(VAE.init)(jax.random.key(0), x, jax.random.key(0))["params"]
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(carry, key):
        params, state = carry

        def loss(params):
            parts = vae_losses(VAE, params, x, key)
            return jnp.mean(parts["reconstruction"] + 0.01 * parts["kl"])

        grads = jax.grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), 500)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    raw = codec.raw_latents({**constants, "vae": params}, vectors)
    constants |= {"vae": params, "latent_mean": raw.mean(axis=0), "latent_std": raw.std(axis=0)}
    data = codec.encode(constants, vectors)
    np.testing.assert_allclose(data.std(axis=0), 1.0, atol=1e-3)
    back = codec.decode(constants, data)
    assert float(jnp.mean((back - vectors) ** 2) / jnp.var(vectors, axis=0).mean()) < 0.2


def test_kl_is_zero_for_the_prior_alone():
    x = jnp.zeros((1, SPEC.num_parameters))
    params = jax.jit(VAE.init)(jax.random.key(0), x, jax.random.key(0))["params"]
    silent = {**params, "moments": jax.tree.map(jnp.zeros_like, params["moments"])}
    losses = jax.jit(lambda params: vae_losses(VAE, params, x, jax.random.key(0)))
    assert float(losses(silent)["kl"][0]) == 0.0
    louder = jax.tree.map(lambda leaf: leaf + 1.0, silent["moments"])
    parts = losses({**params, "moments": louder})
    assert float(parts["kl"][0]) > 0.1
