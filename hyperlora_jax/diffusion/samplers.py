"""Samplers as one `lax.scan` over precomputed per-step numbers.

The timesteps and coefficients of every step are computed on the host, in float64. All samplers
take standard normal noise and return x0. `timestep_spacing` None means each sampler's own default.
Stochastic samplers ask `draw` for the fresh noise z of a step; the others leave it alone.

DDIM with eta = 0 (Song et al. 2021, equation 12):
    (1) x_prev = a_prev x0 + s_prev eps
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from hyperlora_jax.array_types import Array, Float, Int
from hyperlora_jax.diffusion.schedule import NoiseSchedule, to_eps, to_x0
from hyperlora_jax.errors import UserError

Denoiser = Callable[[Array, Array], Array]  # (x_t [b, ...], timesteps [b]) -> prediction [b, ...]
Draw = Callable[[Array, tuple[int, ...]], Array]  # (number of the step, shape) -> normal noise
GAMMA = 0.3  # of TCD: how far a step goes beyond its timestep before noise is added again
LCM_DATA_STD = 0.5  # of the boundary condition of latent consistency models


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
    # The float step makes one too many for some counts (61 of 1000, say), whose last would be -1.
    steps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps]
    return steps.astype(np.int32) - 1


def ddim(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b ..."],
    num_steps: int,
    draw: Draw | None = None,
) -> Float[Array, "b ..."]:
    """Deterministic DDIM from `noise` (standard normal) to x0: (1)."""
    del draw
    timesteps = timesteps_of(schedule, num_steps)
    alphas = _powers_after(schedule, timesteps - schedule.num_train_timesteps // num_steps)
    return _mixed(denoise, schedule, noise, timesteps, (np.sqrt(alphas), np.sqrt(1.0 - alphas)))


def pndm(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b ..."],
    num_steps: int,
    draw: Draw | None = None,
) -> Float[Array, "b ..."]:
    """Pseudo linear multistep from `noise` to x0 (Liu et al. 2022, without Runge-Kutta steps): DDIM
    steps along a mean of the latest predictions, which from the fourth on is

    (8) (55 p0 - 59 p1 + 37 p2 - 9 p3) / 24

    The first step is taken twice, then with the mean of both its ends: one call more than steps.
    """
    del draw
    timesteps, total = timesteps_of(schedule, num_steps), schedule.num_train_timesteps
    ratio = total // num_steps
    seen = np.concatenate([timesteps[:2], timesteps[1:]])
    begin = np.concatenate([timesteps[:1], timesteps[1:2] + ratio, timesteps[1:]])
    after = np.sqrt(_powers_after(schedule, begin - ratio))
    weights = [[24, 0, 0, 0], [12, 12, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0]]
    weights = np.array([*weights, *[[55, -59, 37, -9]] * num_steps], np.float64)[: len(seen)] / 24

    def step(carry, inputs):
        number, timestep, start, weight, signal, sigma = inputs
        x, before = carry
        now = denoise(x, jnp.full((x.shape[0],), timestep)).astype(jnp.float32)
        latest = jnp.concatenate([now[None], before])
        again = number == 1
        x, times = jnp.where(again, noise, x), jnp.full((x.shape[0],), start)
        prediction = jnp.tensordot(weight, latest, 1)
        x0 = to_x0(schedule, prediction, x, times)
        x = signal * x0 + sigma * to_eps(schedule, prediction, x, times)
        return (x, jnp.where(again, before, latest[:3])), None

    noise = noise.astype(jnp.float32)
    times = (jnp.asarray(seen), jnp.asarray(np.minimum(begin, total - 1)))
    mix = _float32(weights, after, np.sqrt(1 - after**2))
    start = (noise, jnp.zeros((3, *noise.shape), jnp.float32))
    return lax.scan(step, start, (jnp.arange(len(seen)), *times, *mix))[0][0]


def _powers_after(schedule: NoiseSchedule, previous: np.ndarray) -> np.ndarray:
    """Signal power at the timesteps that steps lead to; what lies before 0 is the final one."""
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    return np.where(previous >= 0, schedule.alphas_cumprod[np.maximum(previous, 0)], final)


def ancestral(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b ..."],
    num_steps: int,
    draw: Draw | None = None,
) -> Float[Array, "b ..."]:
    """Samples of the reverse Markov chain over `num_steps` of the schedule's steps
    (Ho et al. 2020, algorithm 2), with a_t² / a_prev² in place of 1 - beta_t:

    (4) x_prev = a_prev x0 + sqrt(s_prev² - v) eps + sqrt(v) z,
        v = s_prev² / s_t² (1 - a_t² / a_prev²)

    Without `draw` v is 0: DDIM over exactly these timesteps, which ends at x0 for every count.
    """
    timesteps = timesteps_of(schedule, num_steps)
    powers = schedule.alphas_cumprod.astype(np.float64)
    now = powers[timesteps]
    after = np.append(now[1:], 1.0)
    variance = np.maximum((1 - after) / (1 - now) * (1 - now / after), 0.0) * (draw is not None)
    direct = np.sqrt(np.maximum(1 - after - variance, 0.0))
    coefficients = np.sqrt(after), direct, np.sqrt(variance)
    return _mixed(denoise, schedule, noise, timesteps, coefficients, draw)


def lcm(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b ..."],
    num_steps: int,
    draw: Draw,
) -> Float[Array, "b ..."]:
    """Latent consistency sampling (Luo et al. 2023, algorithm 3): every step goes to x0 and back.

    (5) x_prev = a_prev f + s_prev z,  f = c_out x0 + c_skip x; the last step returns f
    """
    timesteps = _distilled_timesteps(schedule, num_steps)
    powers = schedule.alphas_cumprod.astype(np.float64)
    after = np.append(powers[timesteps[1:]], 1.0)
    scaled, variance = timesteps * schedule.timestep_scaling, LCM_DATA_STD**2
    skip, out = variance / (scaled**2 + variance), scaled / np.sqrt(scaled**2 + variance)
    signal = np.sqrt(after)
    mix = signal * out, np.zeros(num_steps), np.sqrt(1 - after), signal * skip
    return _mixed(denoise, schedule, noise, timesteps, mix, draw)


def tcd(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b ..."],
    num_steps: int,
    draw: Draw,
) -> Float[Array, "b ..."]:
    """Trajectory consistency sampling (Zheng et al. 2024, algorithm 4): DDIM to timestep
    r = floor((1 - GAMMA) prev), then noise up to prev; none after the last step.

    (6) x_prev = a_prev / a_r (a_r x0 + s_r eps) + sqrt(1 - a_prev² / a_r²) z
    """
    timesteps = _distilled_timesteps(schedule, num_steps)
    previous = np.append(timesteps[1:], 0)
    powers = schedule.alphas_cumprod.astype(np.float64)
    # float32, as PyTorch multiplies: where the product is whole, float64 can fall short of it.
    reached = np.floor(np.float32(1 - GAMMA) * previous.astype(np.float32)).astype(np.int64)
    ratio = powers[previous] / powers[reached]
    ratio[-1] = 1.0
    mix = np.sqrt(ratio * powers[reached]), np.sqrt(ratio * (1 - powers[reached]))
    return _mixed(denoise, schedule, noise, timesteps, (*mix, np.sqrt(1 - ratio)), draw)


def _distilled_timesteps(schedule: NoiseSchedule, num_steps: int) -> Int[np.ndarray, " s"]:
    """Of the timesteps that a consistency model was distilled at, `num_steps` evenly spaced."""
    taught = min(schedule.original_inference_steps, schedule.num_train_timesteps)
    if not 1 <= num_steps <= taught:
        raise UserError(
            f"num_steps is {num_steps}, expected 1 to {taught} (steps that the model was distilled "
            "from: original_inference_steps of the scheduler)"
        )
    descending = np.arange(taught, 0, -1) * (schedule.num_train_timesteps // taught) - 1
    return descending[np.floor(np.linspace(0, taught, num_steps, endpoint=False)).astype(np.int64)]


def _mixed(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: Array,
    timesteps: np.ndarray,
    coefficients: tuple[np.ndarray, ...],
    draw: Draw | None = None,
) -> Array:
    """Steps x_prev = A x0 + B eps + C z + D x of given [s] coefficients (A, B[, C[, D]])."""
    zeros = np.zeros(len(timesteps))
    mix = (*coefficients, zeros, zeros)[:4]

    def step(x, inputs):
        number, timestep, to_clean, to_noise, fresh, kept = inputs
        times = jnp.full((x.shape[0],), timestep)
        prediction = denoise(x, times).astype(jnp.float32)
        x0 = to_x0(schedule, prediction, x, times)
        after = to_clean * x0 + to_noise * to_eps(schedule, prediction, x, times) + kept * x
        return (after if draw is None else after + fresh * draw(number, x.shape)), None

    inputs = (jnp.arange(len(timesteps)), jnp.asarray(timesteps), *_float32(*mix))
    return lax.scan(step, noise.astype(jnp.float32), inputs)[0]


def sigmas_at(schedule: NoiseSchedule, timesteps: np.ndarray) -> Float[np.ndarray, " s1"]:
    """sqrt((1 - ā) / ā) at (fractional) timesteps, and a final 0. Zero signal counts as 2^-24."""
    alphas = schedule.alphas_cumprod.astype(np.float64)
    if schedule.rescale_betas_zero_snr:
        alphas = np.append(alphas[:-1], 2.0**-24)
    sigmas = np.sqrt((1 - alphas) / alphas)
    return np.append(np.interp(timesteps, np.arange(len(sigmas)), sigmas), 0.0)


def _karras(
    schedule: NoiseSchedule, num_steps: int, ends: tuple[float, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fractional timesteps [s] and sigmas [s + 1], even in sigma^(1/7) (Karras et al. 2022,
    equation 5), from and to `ends`, or over the whole schedule; and a final 0."""
    trained = sigmas_at(schedule, np.arange(schedule.num_train_timesteps))[:-1]
    first, last = ends or (trained[-1], trained[0])
    sigmas = np.linspace(first ** (1 / 7), last ** (1 / 7), num_steps) ** 7
    timesteps = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))
    return timesteps, np.append(sigmas, 0.0)


def _denoised(schedule: NoiseSchedule, prediction: Array, x: Array, sigma: Array) -> Array:
    """x0 from a prediction at x_t = x0 + sigma eps, scaled by 1 / sqrt(sigma² + 1)."""
    signal = 1 / jnp.sqrt(sigma**2 + 1)
    if schedule.prediction_type == "sample":
        return prediction
    if schedule.prediction_type == "epsilon":
        return (x - sigma * signal * prediction) / signal
    return signal * x - sigma * signal * prediction


def euler(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b ..."],
    num_steps: int,
    draw: Draw | None = None,
    ancestral: bool = False,
) -> Float[Array, "b ..."]:
    """Euler steps of the probability flow in sigma (Karras et al. 2022, algorithm 1, no churn):

    (2) y_prev = y + (y - x0) / sigma (sigma_prev - sigma), y = sqrt(sigma² + 1) x_t

    `ancestral` steps go to a smaller sigma, then noise up to the next one (k-diffusion's word):

    (7) (2) with sqrt(sigma_prev² - u²) in place of sigma_prev, plus u z,
        u = sigma_prev sqrt(1 - sigma_prev² / sigma²)
    """
    draw = draw if ancestral else None
    spacing = schedule.timestep_spacing or "linspace"
    timesteps = timesteps_of(schedule, num_steps, "linspace").astype(np.float32)
    if spacing == "linspace":  # not rounded: sigmas are interpolated
        timesteps = np.linspace(0, schedule.num_train_timesteps - 1, num_steps)[::-1]
    sigmas = sigmas_at(schedule, timesteps)
    if schedule.use_karras_sigmas and draw is None:
        timesteps, sigmas = _karras(schedule, num_steps, (sigmas[0], sigmas[-2]))
    first = np.sqrt(sigmas.max() ** 2 + 1) if spacing == "leading" else sigmas.max()
    now, after = sigmas[:-1], sigmas[1:]
    up = np.zeros(num_steps) if draw is None else after * np.sqrt(1 - (after / now) ** 2)

    def step(y, inputs):
        number, timestep, sigma, lower, up = inputs
        x = y / jnp.sqrt(sigma**2 + 1)
        prediction = denoise(x, jnp.full(noise.shape[:1], timestep)).astype(jnp.float32)
        x0 = _denoised(schedule, prediction, x, sigma)
        y = y + (y - x0) / sigma * (lower - sigma)  # (2)
        return (y if draw is None else y + up * draw(number, y.shape)), None

    numbers = _float32(timesteps, now, np.sqrt(after**2 - up**2), up)
    start = noise.astype(jnp.float32) * jnp.float32(first)
    return lax.scan(step, start, (jnp.arange(num_steps), *numbers))[0]


def multistep(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b ..."],
    num_steps: int,
    draw: Draw | None = None,
    corrects: bool = False,
) -> Float[Array, "b ..."]:
    """DPM-Solver++(2M), midpoint form, first and last step of order one (Lu et al. 2022, alg. 2).

    With lambda = log(a / s), h = lambda_prev - lambda and r = h_before / h:
    (3) x_prev = s_prev / s x - a_prev (exp(-h) - 1) (x0 + (x0 - x0_before) / (2 r))

    With `corrects` UniPC of order two (Zhao et al. 2023, B(h) = exp(h) - 1): once x0 is known at
    the end of a step, the step is taken again along

    (9) x0_begin + p (x0_before - x0_begin) + q (x0_end - x0_begin)
    """
    del draw
    timesteps = _dpm_timesteps(schedule, num_steps)
    sigmas = sigmas_at(schedule, timesteps)
    if schedule.use_karras_sigmas:
        timesteps, sigmas = _karras(schedule, num_steps)
        if corrects or schedule.beta_schedule != "squaredcos_cap_v2":
            timesteps = timesteps.round()
        else:  # as PyTorch's class does
            timesteps = np.floor(timesteps)
    signal = 1 / np.sqrt(sigmas**2 + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = -np.diff(np.log(sigmas))  # lambda = -log(sigma); the last is infinite
        half = 0.5 * h[1:] / h[:-1]
    half = np.append(0.0, half)
    half[-1] = 0.0
    keep = (sigmas * signal)[1:] / (sigmas * signal)[:-1]
    gain = -signal[1:] * np.expm1(-h)
    # Of the step before, which the corrector takes again.
    again = np.insert(_corrections(h), 0, 0.0, axis=0)
    inputs = _float32(
        timesteps, sigmas[:-1], keep, gain, half,
        np.insert(keep[:-1], 0, 1.0), np.insert(gain[:-1], 0, 0.0), *again.T,
    )  # fmt: skip

    def step(carry, inputs):
        x, begin, before, last = carry
        timestep, sigma, keep, gain, half, keep_again, gain_again, p, q = inputs
        times = jnp.full(noise.shape[:1], timestep)
        prediction = denoise(x, times).astype(jnp.float32)
        x0 = _denoised(schedule, prediction, x, sigma)
        if corrects:
            x = keep_again * last + gain_again * (
                begin + p * (before - begin) + q * (x0 - begin)
            )  # (9)
        return (keep * x + gain * (x0 + half * (x0 - begin)), x0, begin, x), None  # (3)

    start = noise.astype(jnp.float32)
    nothing = jnp.zeros_like(start)
    return lax.scan(step, (start, nothing, nothing, start), inputs)[0][0]


def _corrections(h: np.ndarray) -> Float[np.ndarray, "s1 2"]:
    """p and q of (9) for every step but the last, of the widths h in lambda."""
    weights = np.zeros((len(h) - 1, 2))
    for k, width in enumerate(-h[:-1]):
        one = np.expm1(width)
        two = one / width - 1
        if k == 0:
            weights[k] = 0.0, 0.5
        else:
            ratio = -h[k - 1] / h[k]
            right = two / one, (two / width - 0.5) * 2 / one
            weights[k] = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], right)
            weights[k, 0] /= ratio
    return weights


def _dpm_timesteps(schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
    """DPM-Solver cuts the range into one part more than there are steps."""
    total = schedule.num_train_timesteps
    steps = timesteps_of(schedule, num_steps, "linspace")  # checks num_steps
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "linspace":
        return np.linspace(0, total - 1, num_steps + 1).round()[:0:-1]
    if spacing == "leading":
        ratio = total // (num_steps + 1)
        return (np.arange(num_steps + 1) * ratio)[:0:-1] + schedule.steps_offset
    return steps


def _float32(*arrays: np.ndarray) -> tuple[Array, ...]:
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


SAMPLERS: dict[str, Callable] = {
    "ddim": ddim,
    "euler": euler,
    "euler_a": functools.partial(euler, ancestral=True),
    "dpmpp_2m": multistep,
    "pndm": pndm,
    "unipc": functools.partial(multistep, corrects=True),
    "lcm": lcm,
    "tcd": tcd,
}
