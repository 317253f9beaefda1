"""The jitted functions behind `StableDiffusion`: prompts, images, latents, sampling.

Modules, schedule and step count are static (hashable); arrays are arguments, so frozen parameters
are never baked into a program.
"""

import functools

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, Float, Int, Params, PRNGKey
from hyperlora_jax.diffusion.samplers import SAMPLERS
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.lora.factors import scale as scale_lora
from hyperlora_jax.stable_diffusion.autoencoder import AutoencoderKL
from hyperlora_jax.stable_diffusion.clip_text import ClipTextModel
from hyperlora_jax.stable_diffusion.unet import UNet


@functools.partial(jax.jit, static_argnames=("encoder",))
def encode_tokens(
    encoder: ClipTextModel, params: Params, tokens: Int[AnyArray, "b n"], lora: Params | None
) -> Float[Array, "b n e"]:
    """Last hidden states after the final norm."""
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    return encoder.apply(variables, tokens).last_hidden_state


@functools.partial(jax.jit, static_argnames=("vae",))
def encode_images(
    vae: AutoencoderKL, params: Params, images: Float[Array, "b h w 3"], key: PRNGKey | None
) -> Float[Array, "b hh ww z"]:
    """Scaled latents of images in [0, 1]."""
    mean, logvar = vae.apply({"params": params}, 2.0 * images - 1.0, method="encode")
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    if key is not None:
        mean = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    return vae.scale_latents(mean)


@functools.partial(jax.jit, static_argnames=("vae",))
def decode_latents(
    vae: AutoencoderKL, params: Params, latents: Float[Array, "b hh ww z"]
) -> Float[Array, "b h w 3"]:
    """Images in [0, 1] of scaled latents."""
    images = vae.apply({"params": params}, vae.unscale_latents(latents), method="decode")
    return jnp.clip(images.astype(jnp.float32) / 2.0 + 0.5, 0.0, 1.0)


@functools.partial(
    jax.jit, static_argnames=("unet", "vae", "schedule", "sampler", "num_steps", "guided")
)
def sample_images(
    unet: UNet,
    vae: AutoencoderKL,
    schedule: NoiseSchedule,
    sampler: str,
    num_steps: int,
    guided: bool,
    params: dict[str, Params],
    noise: Float[Array, "b hh ww z"],
    text_states: Float[Array, "g n e"],
    guidance: Float[Array, ""],
    lora: Params | None,
    strength: Float[Array, "*l"],
) -> Float[Array, "b h w 3"]:
    """The whole sampling loop and the decoding.

    `text_states` has b rows, or 2 b rows (negative, positive, negative, ...) when `guided`.
    """
    variables = {"params": params["unet"]}
    if lora is not None:
        variables["lora"] = scale_lora(lora, strength)

    def denoise(x: Array, timesteps: Array) -> Array:
        if not guided:
            return unet.apply(variables, x, timesteps, text_states)
        doubled = jnp.repeat(x, 2, axis=0), jnp.repeat(timesteps, 2, axis=0)
        both = unet.apply(variables, *doubled, text_states).astype(jnp.float32)
        both = both.reshape(-1, 2, *x.shape[1:])
        negative, positive = both[:, 0], both[:, 1]
        return negative + guidance * (positive - negative)

    latents = SAMPLERS[sampler](denoise, schedule, noise, num_steps)
    return decode_latents(vae, params["vae"], latents)
