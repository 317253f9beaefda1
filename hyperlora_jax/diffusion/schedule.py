"""Noise schedules and the conversions between x0, noise and velocity.

With a_t = sqrt(alphas_cumprod[t]) and s_t = sqrt(1 - alphas_cumprod[t]):

    (1) x_t = a_t x0 + s_t eps        `add_noise`
    (2) v_t = a_t eps - s_t x0        (Salimans & Ho 2022, appendix D)

Files of diffusers are read by `scheduler_config.py`.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Array, Float, Int
from hyperlora_jax.errors import UserError

_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_SPACINGS = ("leading", "trailing", "linspace")
# Classes of diffusers and the sampler that draws what they draw.
SAMPLER_OF = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "EulerDiscreteScheduler": "euler",
    "LCMScheduler": "lcm",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Discrete schedule; hashable, so that it can be a static jit argument.

    `timestep_spacing` None stands for the default of whichever sampler is used. That and what
    follows it concern sampling only, the two after `set_alpha_to_one` only consistency models.
    `sampler` is what the model is drawn with unless told otherwise.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    trained_betas: tuple[float, ...] | None = None
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    use_karras_sigmas: bool = False
    sampler: str = "ddim"

    def __post_init__(self):
        for key, choices in (
            ("beta_schedule", _BETA_SCHEDULES),
            ("prediction_type", _PREDICTIONS),
            ("timestep_spacing", (*_SPACINGS, None)),
        ):
            if getattr(self, key) not in choices:
                raise UserError(
                    f"noise schedule: {key} = {getattr(self, key)!r} is not supported, expected "
                    f"one of {list(choices)}"
                )
        least = {"num_train_timesteps": 1, "original_inference_steps": 1, "steps_offset": 0}
        for key, smallest in least.items():
            if not smallest <= (number := getattr(self, key)) <= 10**6:
                raise UserError(
                    f"noise schedule: {key} is {number}, expected {smallest} to 1,000,000"
                )
        ends = self.trained_betas or (self.beta_start, self.beta_end)
        if not 0 <= min(ends) <= max(ends) < 1:
            raise UserError(
                f"noise schedule: betas are {min(ends)} to {max(ends)}, expected them in [0, 1)"
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"noise schedule: trained_betas has {len(self.trained_betas)} numbers, "
                f"num_train_timesteps is {self.num_train_timesteps}; expected one for each"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(
                "noise schedule: rescale_betas_zero_snr needs prediction_type v_prediction or "
                "sample, found epsilon (nothing can be learned at zero signal)"
            )

    def to_config(self) -> dict[str, object]:
        """scheduler_config.json as diffusers' class of `sampler` reads it."""
        values = dataclasses.asdict(self)
        sampler = values.pop("sampler")
        kind = next(name for name, own in SAMPLER_OF.items() if own == sampler)
        config = {"_class_name": kind, **values}
        if sampler not in ("lcm", "tcd"):
            del config["original_inference_steps"], config["timestep_scaling"]
        if sampler not in ("dpmpp_2m", "euler", "unipc"):
            del config["use_karras_sigmas"]
        if sampler in ("ddim", "lcm", "tcd"):
            config["clip_sample"] = False
        elif sampler == "pndm":
            config["skip_prk_steps"] = True
        else:
            del config["set_alpha_to_one"]
        if self.timestep_spacing is None:
            own = "linspace" if sampler in ("dpmpp_2m", "euler", "euler_a", "unipc") else "leading"
            config["timestep_spacing"] = own
        return config

    @functools.cached_property
    def betas(self) -> Float[np.ndarray, " t"]:
        """Variances per step, float32."""
        n = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, np.float32)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, n, dtype=np.float64)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, n, dtype=np.float64) ** 2
        else:
            bars = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
            betas = np.asarray([min(1 - bars[i + 1] / bars[i], 0.999) for i in range(n)])
        if self.rescale_betas_zero_snr:
            betas = _zero_terminal_snr(betas)
        return betas.astype(np.float32)

    @functools.cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, " t"]:
        """Signal power a_t² per step, float32."""
        return np.cumprod(1.0 - self.betas.astype(np.float64)).astype(np.float32)

    def coefficients(
        self, timesteps: Int[AnyArray, " b"], ndim: int
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """a_t and s_t, shaped [b, 1, ...] with `ndim` axes."""
        alphas = jnp.asarray(self.alphas_cumprod)[timesteps]
        alphas = alphas.reshape(-1, *(1,) * (ndim - 1))
        return jnp.sqrt(alphas), jnp.sqrt(1.0 - alphas)

    def snr(self, timesteps: Int[AnyArray, " b"]) -> Float[Array, " b"]:
        """Signal-to-noise ratio a_t² / s_t²."""
        signal, noise = self.coefficients(timesteps, 1)
        return (signal / noise) ** 2


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(alphas_cumprod) so that the last is 0 (Lin et al. 2023, alg. 1)."""
    roots = np.sqrt(np.cumprod(1.0 - betas))
    first, last = roots[0], roots[-1]
    bars = ((roots - last) * first / (first - last)) ** 2
    return 1.0 - np.concatenate([bars[:1], bars[1:] / bars[:-1]])


def add_noise(
    schedule: NoiseSchedule,
    x0: Float[AnyArray, "b ..."],
    noise: Float[AnyArray, "b ..."],
    timesteps: Int[AnyArray, " b"],
) -> Float[Array, "b ..."]:
    """x_t, equation (1)."""
    signal, sigma = schedule.coefficients(timesteps, x0.ndim)
    return signal * x0 + sigma * noise


def target(
    schedule: NoiseSchedule,
    x0: Float[AnyArray, "b ..."],
    noise: Float[AnyArray, "b ..."],
    timesteps: Int[AnyArray, " b"],
) -> Float[Array, "b ..."]:
    """What the model is trained to predict: eps, v of equation (2), or x0."""
    if schedule.prediction_type == "epsilon":
        return jnp.asarray(noise)
    if schedule.prediction_type == "sample":
        return jnp.asarray(x0)
    signal, sigma = schedule.coefficients(timesteps, x0.ndim)
    return signal * noise - sigma * x0


def to_x0(
    schedule: NoiseSchedule,
    prediction: Float[AnyArray, "b ..."],
    x_t: Float[AnyArray, "b ..."],
    timesteps: Int[AnyArray, " b"],
) -> Float[Array, "b ..."]:
    """x0 that a prediction stands for."""
    if schedule.prediction_type == "sample":
        return jnp.asarray(prediction)
    signal, sigma = schedule.coefficients(timesteps, x_t.ndim)
    if schedule.prediction_type == "epsilon":
        return jnp.asarray((x_t - sigma * prediction) / signal)
    return jnp.asarray(signal * x_t - sigma * prediction)


def to_eps(
    schedule: NoiseSchedule,
    prediction: Float[AnyArray, "b ..."],
    x_t: Float[AnyArray, "b ..."],
    timesteps: Int[AnyArray, " b"],
) -> Float[Array, "b ..."]:
    """Noise that a prediction stands for."""
    if schedule.prediction_type == "epsilon":
        return jnp.asarray(prediction)
    signal, sigma = schedule.coefficients(timesteps, x_t.ndim)
    if schedule.prediction_type == "sample":
        return jnp.asarray((x_t - signal * prediction) / sigma)
    return jnp.asarray(signal * prediction + sigma * x_t)
