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

from hyperlora_jax.array_types import Array, Float, Json, Params
from hyperlora_jax.batches.pipelines import subject_batches
from hyperlora_jax.hypernet.weight_diffusion import Latents, Whitened, vae_losses
from hyperlora_jax.parallel import sharding
from hyperlora_jax.train.hypernetwork.hypernet_data import TrainingTargets
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
    targets: TrainingTargets,
    config: ConfigDict,
    *,
    workdir: epath.PathLike,
    mesh: Mesh,
    batch_size: int,
    facts: Json,
) -> Params:
    """Trains the VAE in `workdir` and returns the constants that its latents need.

    Args:
        batch_size: LoRAs a step, on all devices together.
        workdir: a finished one gives its VAE at once, so that several generators can share it.
    """
    section, seed = config.train.vae, config.train.seed
    statistics = {"mean": targets.mean, "std": targets.std}
    batches = subject_batches(
        None,
        None,
        batch_size=batch_size,
        seed=seed,
        per_subject={"target": targets.rows},
        subjects=targets.subjects,
        rows=sharding.host_rows(mesh, batch_size),
    )

    def init(key: Array) -> Params:
        return codec.vae.init(key, jnp.zeros((1, codec.spec.num_parameters)), key)["params"]

    task = Task(
        name="vae",
        init=init,
        loss=functools.partial(vae_loss, codec=codec, kl=section.kl_weight),
        frozen=statistics,
        batches=batches,
        facts=facts,
    )
    constants = {**statistics, "vae": fit_section(task, section, config, workdir, mesh)}
    return constants | latent_statistics(codec, constants, targets.rows, targets.subjects)


def latent_statistics(
    codec: Latents, constants: Params, targets: Any, subjects: np.ndarray
) -> dict[str, Array]:
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
