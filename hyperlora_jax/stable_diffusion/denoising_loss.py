"""The denoising loss of Stable Diffusion, per example.

    L(x0) = w_t mean((model(a_t x0 + s_t eps, t, text) - target)²)

w_t = 1, or the min-SNR weight of Hang et al. 2023 (equation 4 and its v-prediction form).
"""

import dataclasses

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, Float, Int, Params, PRNGKey
from hyperlora_jax.diffusion.schedule import NoiseSchedule, add_noise, target
from hyperlora_jax.stable_diffusion.networks.unet import UNet
from hyperlora_jax.stable_diffusion.text_conditions import Text, apply_unet


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A UNet without its parameters, its noise, and what weighs a timestep; hashable."""

    unet: UNet
    schedule: NoiseSchedule
    min_snr_gamma: float | None = None


def denoising_loss(
    denoiser: Denoiser,
    params: Params,
    latents: Float[AnyArray, "b h w z"],
    text: Text,
    key: PRNGKey,
    lora: Params | None = None,
) -> Float[Array, " b"]:
    """Loss of every example at a timestep and noise drawn from `key`.

    `latents` are scaled, `text` has b rows (`text_conditions`); L LoRAs serve the b examples,
    example k uses LoRA k // (b / L).
    """
    time_key, noise_key = jax.random.split(key)
    last = denoiser.schedule.num_train_timesteps
    timesteps = jax.random.randint(time_key, latents.shape[:1], 0, last)
    noise = jax.random.normal(noise_key, latents.shape)
    return denoising_error(denoiser, params, latents, text, timesteps, noise, lora)


def denoising_error(
    denoiser: Denoiser,
    params: Params,
    latents: Float[AnyArray, "b h w z"],
    text: Text,
    timesteps: Int[AnyArray, " b"],
    noise: Float[AnyArray, "b h w z"],
    lora: Params | None = None,
) -> Float[Array, " b"]:
    """`denoising_loss` at given timesteps and noise."""
    schedule, gamma = denoiser.schedule, denoiser.min_snr_gamma
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    latents = jnp.asarray(latents, jnp.float32)
    noisy = add_noise(schedule, latents, noise, timesteps)
    prediction = apply_unet(denoiser.unet, variables, noisy, timesteps, text)
    error = prediction.astype(jnp.float32) - target(schedule, latents, noise, timesteps)
    losses = jnp.square(error).mean((1, 2, 3))
    return losses if gamma is None else losses * min_snr_weight(schedule, timesteps, gamma)


def min_snr_weight(
    schedule: NoiseSchedule, timesteps: Int[AnyArray, " b"], gamma: float
) -> Float[Array, " b"]:
    """min(SNR, gamma) divided by the SNR power that the prediction type already weighs with."""
    snr = schedule.snr(timesteps)
    clipped = jnp.minimum(snr, gamma)
    if schedule.prediction_type == "sample":
        return clipped
    divisor = snr if schedule.prediction_type == "epsilon" else snr + 1.0
    return clipped / divisor
