"""The first stage of latent diffusion: the VAE over LoRA vectors, and statistics of its latents."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hyperlora_jax.array_types import Array, Float, Params
from hyperlora_jax.batches.pipelines import subject_batches
from hyperlora_jax.hypernet.weight_diffusion import Latents, Whitened, vae_losses
from hyperlora_jax.parallel import sharding
from hyperlora_jax.train.loop import Task, fit_section

CHUNK = 256


def vae_loss(
    params: Params,
    frozen: Params,
    batch: Mapping[str, Array],
    key: Array,
    *,
    codec: Latents,
    kl: float,
) -> tuple[Float[Array, " l"], dict[str, Float[Array, " l"]]]:
    """reconstruction + kl weight · KL, and both by name."""
    x = Whitened(codec.spec).encode(frozen, batch["target"].astype(jnp.float32))
    parts = vae_losses(codec.vae, params, x, key)
    return parts["reconstruction"] + kl * parts["kl"], parts


def train_vae(
    codec: Latents,
    constants: Params,
    targets: object,
    subjects: np.ndarray,
    section: ConfigDict,
    *,
    workdir: epath.PathLike,
    mesh: Mesh,
    seed: int,
    batch_size: int,
    facts: dict[str, object],
    config: ConfigDict,
) -> Params:
    """Trains the VAE in `workdir` and returns the constants that its latents need.

    Args:
        constants: "mean" and "std" of the vectors.
        targets: array-like [n, d] of LoRA vectors; subjects: rows to train on.
        section: the config's `train.vae`.
        batch_size: LoRAs a step, on all devices together.
        workdir: a finished one gives its VAE at once, so that several generators can share it.
    """
    batches = subject_batches(
        None,
        None,
        batch_size=batch_size,
        seed=seed,
        per_subject={"target": targets},
        subjects=subjects,
        rows=sharding.host_rows(mesh, batch_size),
    )

    def init(key: Array) -> Params:
        return codec.vae.init(key, jnp.zeros((1, codec.spec.num_parameters)), key)["params"]

    task = Task(
        name="vae",
        init=init,
        loss=functools.partial(vae_loss, codec=codec, kl=section.kl_weight),
        frozen={name: constants[name] for name in ("mean", "std")},
        batches=batches,
        facts=facts,
    )
    trained = fit_section(task, section, workdir=workdir, mesh=mesh, seed=seed, config=config)
    trained_constants = {**constants, "vae": sharding.gather(trained, mesh)}
    return {**trained_constants, **latent_statistics(codec, trained_constants, targets, subjects)}


def latent_statistics(
    codec: Latents, constants: Params, targets: Any, subjects: np.ndarray
) -> Params:
    """Mean and standard deviation of every latent number over the training LoRAs."""
    encode = jax.jit(codec.raw_latents)
    parts = []
    for start in range(0, len(subjects), CHUNK):
        rows = subjects[start : start + CHUNK]
        filled = np.resize(rows, min(CHUNK, len(subjects)))  # one shape, one program
        latents = encode(constants, jnp.asarray(targets[filled], jnp.float32))
        parts.append(np.asarray(latents)[: len(rows)])
    latents = np.concatenate(parts)
    return {
        "latent_mean": latents.mean(axis=0),
        "latent_std": np.maximum(latents.std(axis=0), 1e-4),
    }
