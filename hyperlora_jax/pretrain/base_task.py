"""Training a base model itself: the autoencoder, then the UNet with (or without) its text encoder.

    autoencoder   mean |x − x̂|² + l1 · mean |x − x̂| + kl · KL(q(z|x) ‖ N(0, I))
    UNet          the denoising loss on cached latents and token ids or text conditions, captions
                  dropped at random so that classifier-free guidance works

Both are `Task`s of the ordinary training loop.
"""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Array, ArrayTree, Int, Json, Params
from hyperlora_jax.batches.pipelines import array_batches
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.stable_diffusion.denoising_loss import denoising_loss
from hyperlora_jax.stable_diffusion.networks.autoencoder import AutoencoderKL
from hyperlora_jax.stable_diffusion.networks.unet import UNet
from hyperlora_jax.stable_diffusion.text_conditions import Text
from hyperlora_jax.train.loop import Task


def autoencoder_loss(
    params: Params,
    frozen: Params,
    batch: dict[str, Array],
    key: Array,
    *,
    vae: AutoencoderKL,
    kl_weight: float,
    l1_weight: float,
) -> tuple[Array, dict[str, Array]]:
    """Per-image loss [b] of pictures uint8 [b, h, w, 3], with `mse` on [0, 1] pixels."""
    del frozen
    images = batch["images"].astype(jnp.float32) / 127.5 - 1.0
    moments = vae.apply({"params": params}, images, method="encode")
    mean, logvar = cast(tuple[Array, Array], moments)
    noise = jax.random.normal(key, mean.shape)
    drawn = mean + noise * jnp.exp(0.5 * logvar)
    decoded = cast(Array, vae.apply({"params": params}, drawn, method="decode"))
    error = decoded - images
    axes = (1, 2, 3)
    squared = jnp.mean(jnp.square(error), axis=axes)
    absolute = jnp.mean(jnp.abs(error), axis=axes)
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=axes)
    losses = squared + l1_weight * absolute + kl_weight * kl
    return losses, {"mse": squared / 4.0, "kl": kl}


def autoencoder_task(
    vae: AutoencoderKL,
    init: Callable[[Array], Params],
    images: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    kl_weight: float = 1e-4,
    l1_weight: float = 0.05,
    facts: Json | None = None,
    rows: Int[np.ndarray, " b"] | None = None,
) -> Task:
    """Trains an autoencoder on pictures uint8 [n, h, w, 3]; `init`: key → parameters;
    `rows`: this host's positions in every batch."""
    loss = functools.partial(autoencoder_loss, vae=vae, kl_weight=kl_weight, l1_weight=l1_weight)
    return Task(
        name="autoencoder",
        init=init,
        loss=loss,
        frozen={},
        batches=array_batches({"images": images}, batch_size, seed, rows),
        facts=facts or {},
        units={"images": 1},
    )


def unet_loss(
    params: Params,
    frozen: Params,
    batch: dict[str, Array],
    key: Array,
    *,
    unet: UNet,
    encode_text: Callable[[Params, Params, ArrayTree], Text],
    schedule: NoiseSchedule,
    caption_dropout: float,
    min_snr_gamma: float | None,
) -> tuple[Array, dict[str, Array]]:
    """Per-image denoising loss [b].

    The batch holds scaled latents [b, h, w, c] and captions as `encode_text` takes them, "text", a
    tree of [b, ...]; `frozen` holds the empty one, "empty_text".
    """
    drop_key, noise_key = jax.random.split(key)
    dropped = jax.random.bernoulli(drop_key, caption_dropout, batch["latents"].shape[:1])

    def drop(text: Array, empty: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *[1] * (text.ndim - 1)), empty, text)

    text = jax.tree.map(drop, batch["text"], frozen["empty_text"])
    losses = denoising_loss(
        unet,
        params["unet"],
        schedule,
        batch["latents"].astype(jnp.float32),
        encode_text(params, frozen, text),
        noise_key,
        min_snr_gamma=min_snr_gamma,
    )
    return losses, {}


def unet_task(
    unet: UNet,
    encode_text: Callable[[Params, Params, ArrayTree], Text],
    schedule: NoiseSchedule,
    init: Callable[[Array], Params],
    frozen: Params,
    arrays: Params,
    *,
    batch_size: int,
    seed: int,
    caption_dropout: float = 0.1,
    min_snr_gamma: float | None = None,
    facts: Json | None = None,
    start: Params | None = None,
    rows: Int[np.ndarray, " b"] | None = None,
) -> Task:
    """Trains a UNet on `arrays` = {"latents": [n, h, w, c], "text": a tree of [n, ...]}.

    Args:
        encode_text: (trained parameters, `frozen`, text) → text conditions of b rows.
        init: key → {"unet": …} or {"unet": …, "text_encoder": …}: what is in it is trained.
        frozen: {"empty_text": one row of text} and what `encode_text` reads.
        start: parameters to go on from, instead of `init`'s.
        rows: this host's positions in every batch; None is all of them.
    """
    loss = functools.partial(
        unet_loss,
        unet=unet,
        encode_text=encode_text,
        schedule=schedule,
        caption_dropout=caption_dropout,
        min_snr_gamma=min_snr_gamma,
    )
    return Task(
        name="unet",
        init=init,
        loss=loss,
        frozen=frozen,
        batches=array_batches(arrays, batch_size, seed, rows),
        facts=facts or {},
        units={"images": 1},
        start=start,
    )
