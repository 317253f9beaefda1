"""How data becomes noise and back, under one Protocol: for diffusion over arrays of any meaning.

    VariancePreserving   x_t = a_t x0 + s_t eps, cosine schedule (Nichol & Dhariwal 2021); the model
                         predicts x0 or v; sampled by DDIM or ancestrally
    RectifiedFlow        x_t = (1 - t) x0 + t eps, the model predicts eps - x0 (Liu et al. 2022);
                         sampled by Euler steps, or with fresh noise at every step (ancestral)

Times are what the model is given: numbers in [0, 1]. Data should have unit variance.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, Float
from hyperlora_jax.diffusion import samplers, schedule

PREDICTIONS = ("x0", "v", "flow")
SAMPLERS = ("ddim", "ancestral")
Denoiser = Callable[[Array, Array], Array]  # (x_t [b, ...], time [b] in [0, 1]) -> prediction


@runtime_checkable
class Process(Protocol):
    """A way from data to noise, what a model predicts on it, and the way back."""

    def draw_times(self, key: Array, count: int) -> Float[Array, " b"]:
        """Training times."""
        ...

    def add_noise(
        self, x0: Float[Array, "b *n"], noise: Float[Array, "b *n"], time: Float[Array, " b"]
    ) -> Float[Array, "b *n"]:
        """x_t."""
        ...

    def target(
        self, x0: Float[Array, "b *n"], noise: Float[Array, "b *n"], time: Float[Array, " b"]
    ) -> Float[Array, "b *n"]:
        """What the model is trained to predict."""
        ...

    def to_x0(
        self, prediction: Float[Array, "b *n"], x_t: Float[Array, "b *n"], time: Float[Array, " b"]
    ) -> Float[Array, "b *n"]:
        """The data that a prediction stands for."""
        ...

    def sample(
        self,
        denoise: Denoiser,
        noise: Float[Array, "b *n"],
        num_steps: int,
        sampler: str,
        key: Array,
    ) -> Float[Array, "b *n"]:
        """From standard normal noise to data."""
        ...


def make_process(prediction: str, num_train_timesteps: int = 1000) -> Process:
    """The process on which a model predicts `prediction`: "x0", "v" or "flow".

    Raises:
        ValueError: another prediction.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}, expected one of {PREDICTIONS}")
    if prediction == "flow":
        return RectifiedFlow()
    return VariancePreserving(prediction, num_train_timesteps)


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
    """Cosine schedule of `num_train_timesteps` discrete steps."""

    prediction: str = "x0"
    num_train_timesteps: int = 1000

    @functools.cached_property
    def schedule(self) -> schedule.NoiseSchedule:
        """The schedule in the terms of `diffusion/schedule.py`."""
        return schedule.NoiseSchedule(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type={"x0": "sample", "v": "v_prediction"}[self.prediction],
            timestep_spacing="trailing",
        )

    def _steps(self, time: Array) -> Array:
        return jnp.round(time * self.num_train_timesteps).astype(jnp.int32) - 1

    def draw_times(self, key: Array, count: int) -> Float[Array, " b"]:
        """See `Process`."""
        steps = jax.random.randint(key, (count,), 0, self.num_train_timesteps)
        return (steps + 1.0) / self.num_train_timesteps

    def add_noise(self, x0: Array, noise: Array, time: Array) -> Array:
        """See `Process`."""
        return schedule.add_noise(self.schedule, x0, noise, self._steps(time))

    def target(self, x0: Array, noise: Array, time: Array) -> Array:
        """See `Process`."""
        return schedule.target(self.schedule, x0, noise, self._steps(time))

    def to_x0(self, prediction: Array, x_t: Array, time: Array) -> Array:
        """See `Process`."""
        return schedule.to_x0(self.schedule, prediction, x_t, self._steps(time))

    def sample(
        self, denoise: Denoiser, noise: Array, num_steps: int, sampler: str, key: Array
    ) -> Array:
        """See `Process`."""
        _check_sampler(sampler)

        def at_step(x: Array, steps: Array) -> Array:
            return denoise(x, (steps + 1.0) / self.num_train_timesteps)

        def draw(number: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(jax.random.fold_in(key, number), shape)

        given = None if sampler == "ddim" else draw
        return samplers.ancestral(at_step, self.schedule, noise, num_steps, given)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines between data and noise."""

    def draw_times(self, key: Array, count: int) -> Float[Array, " b"]:
        """See `Process`."""
        return 1.0 - jax.random.uniform(key, (count,))

    def add_noise(self, x0: Array, noise: Array, time: Array) -> Array:
        """See `Process`."""
        t = _column(time, x0)
        return (1.0 - t) * x0 + t * noise

    def target(self, x0: Array, noise: Array, time: Array) -> Array:
        """See `Process`."""
        del time
        return noise - x0

    def to_x0(self, prediction: Array, x_t: Array, time: Array) -> Array:
        """See `Process`."""
        return x_t - _column(time, x_t) * prediction

    def sample(
        self, denoise: Denoiser, noise: Array, num_steps: int, sampler: str, key: Array
    ) -> Array:
        """See `Process`; "ddim" takes Euler steps, "ancestral" draws from the posterior."""
        _check_sampler(sampler)
        grid = jnp.linspace(1.0, 0.0, num_steps + 1)

        def step(x, inputs):
            number, time, after = inputs
            times = jnp.full((x.shape[0],), time)
            prediction = denoise(x, times)
            if sampler == "ddim":
                return x + (after - time) * prediction, None
            # Posterior of x_after given x_t and x0 for signal 1 - t and noise t.
            ratio = (1.0 - time) / jnp.maximum(1.0 - after, 1e-6)
            variance = jnp.maximum(time**2 - (ratio * after) ** 2, 0.0) * (after / time) ** 2
            x0 = self.to_x0(prediction, x, times)
            direct = jnp.sqrt(jnp.maximum(after**2 - variance, 0.0))
            fresh = jax.random.normal(jax.random.fold_in(key, number), x.shape)
            mean = (1.0 - after) * x0 + direct * (x0 + prediction)  # eps = x0 + v
            return mean + jnp.sqrt(variance) * fresh, None

        inputs = (jnp.arange(num_steps), grid[:-1], grid[1:])
        return jax.lax.scan(step, noise.astype(jnp.float32), inputs)[0]


def _check_sampler(sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {SAMPLERS}")


def _column(time: Array, like: Array) -> Array:
    return time.reshape(-1, *(1,) * (like.ndim - 1))
