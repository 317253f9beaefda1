"""The jitted functions behind `StableDiffusion`: prompts, images, latents, sampling.

Modules, schedule and step count are static (hashable); arrays are arguments, so frozen parameters
are never baked into a program.
"""

import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, Float, Int, Params, PRNGKey, Shaped
from hyperlora_jax.diffusion.samplers import SAMPLERS
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.stable_diffusion.networks.autoencoder import AutoencoderKL
from hyperlora_jax.stable_diffusion.networks.clip_text import ClipTextModel, ClipTextOutput
from hyperlora_jax.stable_diffusion.networks.unet import UNet, sinusoidal_embedding
from hyperlora_jax.stable_diffusion.prompt_embeddings import Text, apply_unet, with_sizes


@functools.partial(jax.jit, static_argnames=("encoders", "is_xl", "clip_skip"))
def encode_tokens(
    encoders: tuple[ClipTextModel, ...],
    params: tuple[Params, ...],
    tokens: tuple[Int[AnyArray, "b n"], ...],
    loras: tuple[Params | None, ...],
    is_xl: bool = False,
    clip_skip: int = 0,
) -> dict[str, Array]:
    """ "states" [b, n, e] and, of SDXL, "pooled" [b, p].

    SD 1.x and 2.x: last state after the final norm. SDXL: penultimate states of all encoders,
    concatenated, without the final norm, and the projected pooled state of the last one. The states
    are those of `clip_skip` layers before."""
    outputs = [
        cast(
            ClipTextOutput,
            encoder.apply({"params": p} if not lora else {"params": p, "lora": lora}, t, clip_skip),
        )
        for encoder, p, t, lora in zip(encoders, params, tokens, loras, strict=True)
    ]
    if not is_xl:
        return {"states": outputs[0].last_hidden_state}
    states = jnp.concatenate([output.penultimate for output in outputs], axis=-1)
    return {"states": states, "pooled": outputs[-1].pooled}


@functools.partial(jax.jit, static_argnames=("vae",))
def encode_images(
    vae: AutoencoderKL, params: Params, images: Float[Array, "b h w 3"], key: PRNGKey | None
) -> Float[Array, "b hh ww z"]:
    """Scaled latents of images in [0, 1]."""
    moments = vae.apply({"params": params}, 2.0 * images - 1.0, method="encode")
    mean, logvar = cast(tuple[Array, Array], moments)
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    if key is not None:
        mean = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    return vae.scale_latents(mean)


@functools.partial(jax.jit, static_argnames=("vae",))
def decode_latents(
    vae: AutoencoderKL, params: Params, latents: Float[Array, "b hh ww z"]
) -> Float[Array, "b h w 3"]:
    """Images in [0, 1] of scaled latents."""
    unscaled = vae.unscale_latents(latents)
    images = cast(Array, vae.apply({"params": params}, unscaled, method="decode"))
    return jnp.clip(images.astype(jnp.float32) / 2.0 + 0.5, 0.0, 1.0)


Guided = Literal["", "beside", "apart"]


@functools.partial(
    jax.jit, static_argnames=("unet", "vae", "schedule", "sampler", "num_steps", "guided")
)
def sample_images(  # noqa: PLR0913
    unet: UNet,
    vae: AutoencoderKL,
    schedule: NoiseSchedule,
    sampler: str,
    num_steps: int,
    guided: Guided,
    params: dict[str, Params],
    noise: Float[Array, "b hh ww z"],
    text: Text,
    guidance: Float[Array, ""],
    lora: Params | None,
    keys: Shaped[Array, "b ..."],
) -> Float[Array, "b h w 3"]:
    """The whole sampling loop and the decoding.

    `text` has b rows; when `guided` "beside" 2 b rows, negative, positive, negative, ..., so that a
    LoRA serves both branches of its pictures; when "apart" all negative rows and then all positive
    ones, and `lora` has those of the negative branch before the others. `keys` are of the fresh
    noise that some samplers add, one per picture.
    """
    variables = {"params": params["unet"]}
    if lora is not None:
        variables["lora"] = lora

    height, width = (size * vae.downsampling for size in noise.shape[1:3])
    text = with_sizes(text, (height, width))
    if width := unet.settings.guidance_width:  # a distilled guidance: told, and not applied
        scale = jnp.broadcast_to(1000.0 * (guidance - 1.0), text["states"].shape[:1])
        embedded = sinusoidal_embedding(scale, width, flip_sin_to_cos=False, freq_shift=1.0)
        text = {**text, "timestep_cond": embedded}

    def draw(number: Array, shape: tuple[int, ...]) -> Array:
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, number), shape[1:]))(keys)

    def denoise(x: Array, timesteps: Array) -> Array:
        if not guided:
            return apply_unet(unet, variables, x, timesteps, text)
        axis = 1 if guided == "beside" else 0
        doubled = (stacked(x, x, axis), stacked(timesteps, timesteps, axis))
        both = apply_unet(unet, variables, *doubled, text).astype(jnp.float32)
        split = (-1, 2) if guided == "beside" else (2, -1)
        both = both.reshape(*split, *x.shape[1:])
        negative, positive = jnp.moveaxis(both, axis, 0)
        return negative + guidance * (positive - negative)

    latents = SAMPLERS[sampler](denoise, schedule, noise, num_steps, draw)
    return decode_latents(vae, params["vae"], latents)


def stacked(
    negative: Shaped[Array, "b *rest"], positive: Shaped[Array, "b *rest"], axis: int
) -> Shaped[Array, "bb *rest"]:
    """Rows of both branches, beside each other (axis 1) or one branch after the other (0)."""
    return jnp.stack([negative, positive], axis).reshape(-1, *positive.shape[1:])
