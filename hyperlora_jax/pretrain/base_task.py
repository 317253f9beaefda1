"""Training a base model itself: the autoencoder, then the UNet with (or without) its text encoder.

    autoencoder   mean |x − x̂|² + l1 · mean |x − x̂| + kl · KL(q(z|x) ‖ N(0, I))
    UNet          the denoising loss on cached latents and token ids or prompt embeddings, captions
                  dropped at random so that classifier-free guidance works

Both are trained as `Task`s of the ordinary loop.
"""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, ArrayTree, Json, Params
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser, denoising_loss
from hyperlora_jax.stable_diffusion.networks.autoencoder import AutoencoderKL
from hyperlora_jax.stable_diffusion.prompt_embeddings import Text
from hyperlora_jax.train.loop import Batches, Task


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


def unet_loss(
    params: Params,
    frozen: Params,
    batch: dict[str, Array],
    key: Array,
    *,
    denoiser: Denoiser,
    encode_text: Callable[[Params, Params, ArrayTree], Text],
    caption_dropout: float,
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
        denoiser,
        params["unet"],
        batch["latents"].astype(jnp.float32),
        encode_text(params, frozen, text),
        noise_key,
    )
    return losses, {}


def unet_task(
    denoiser: Denoiser,
    encode_text: Callable[[Params, Params, ArrayTree], Text],
    init: Callable[[Array], Params],
    frozen: Params,
    batches: Batches,
    *,
    caption_dropout: float,
    facts: Json | None = None,
    start: Params | None = None,
) -> Task:
    """Trains a UNet on batches {"latents": [b, h, w, c], "text": a tree of [b, ...]}.

    Args:
        encode_text: (trained parameters, `frozen`, text) → prompt embeddings of b rows.
        init: key → {"unet": …} or {"unet": …, "text_encoder": …}: what is in it is trained.
        frozen: {"empty_text": one row of text} and what `encode_text` reads.
        start: parameters to go on from, instead of `init`'s.
    """
    return Task(
        name="unet",
        init=init,
        loss=functools.partial(
            unet_loss, denoiser=denoiser, encode_text=encode_text, caption_dropout=caption_dropout
        ),
        frozen=frozen,
        batches=batches,
        facts=facts or {},
        units={"images": 1},
        start=start,
    )
