"""Samplers as one `lax.scan` over precomputed per-step numbers.

A sampler is made of two parts: `plan` computes on the host, in float64, the timesteps and the
coefficients of every step; `sample` runs them on the device.

DDIM with eta = 0 (Song et al. 2021, equation 12):
    (1) x_prev = a_prev x0 + s_prev eps
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from hyperlora_jax.array_types import Array, Float, Int
from hyperlora_jax.diffusion.schedule import NoiseSchedule, to_eps, to_x0
from hyperlora_jax.errors import UserError

Denoiser = Callable[[Array, Array], Array]  # (x_t [b, ...], timesteps [b]) -> prediction [b, ...]


def timesteps_of(
    schedule: NoiseSchedule, num_steps: int, default_spacing: str = "leading"
) -> Int[np.ndarray, " s"]:
    """Descending timesteps of `num_steps` sampling steps, spaced as the schedule says."""
    total = schedule.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise UserError(f"num_steps is {num_steps}, expected 1 to {total} (training timesteps)")
    spacing = schedule.timestep_spacing or default_spacing
    if spacing == "linspace":
        return np.linspace(0, total - 1, num_steps).round()[::-1].astype(np.int32)
    if spacing == "leading":
        steps = np.arange(num_steps)[::-1] * (total // num_steps)
        return steps.astype(np.int32) + schedule.steps_offset
    steps = np.round(np.arange(total, 0, -total / num_steps))
    return steps.astype(np.int32) - 1


def ddim(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b ..."],
    num_steps: int,
) -> Float[Array, "b ..."]:
    """Deterministic DDIM from `noise` (standard normal) to x0."""
    timesteps = timesteps_of(schedule, num_steps)
    previous = timesteps - schedule.num_train_timesteps // num_steps
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    alphas = np.where(previous >= 0, schedule.alphas_cumprod[np.maximum(previous, 0)], final)
    batch = noise.shape[0]

    def step(x, inputs):
        timestep, alpha = inputs
        times = jnp.full((batch,), timestep)
        prediction = denoise(x, times).astype(jnp.float32)
        x0 = to_x0(schedule, prediction, x, times)
        eps = to_eps(schedule, prediction, x, times)
        return jnp.sqrt(alpha) * x0 + jnp.sqrt(1.0 - alpha) * eps, None  # (1)

    inputs = jnp.asarray(timesteps), jnp.asarray(alphas, jnp.float32)
    return lax.scan(step, noise.astype(jnp.float32), inputs)[0]


SAMPLERS: dict[str, Callable] = {"ddim": ddim}
