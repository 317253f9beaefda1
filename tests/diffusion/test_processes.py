"""Noise and back: the exact denoiser of a known distribution gives its samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.diffusion.processes import PREDICTIONS, SAMPLERS, make_process


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_stands_for_the_data(prediction):
    process = make_process(prediction, 100)
    key = jax.random.key(0)
    x0, noise = jax.random.normal(key, (2, 5, 7))
    time = process.draw_times(jax.random.key(1), 5)
    assert float(time.min()) > 0 and float(time.max()) <= 1
    x_t = process.add_noise(x0, noise, time)
    back = process.to_x0(process.target(x0, noise, time), x_t, time)
    np.testing.assert_allclose(back, x0, atol=1e-4)


def exact_denoiser(process, prediction, mean, std):
    """E[target | x_t] for independent normal data."""

    def denoise(x, time):
        zeros, ones = jnp.zeros_like(x), jnp.ones_like(x)
        signal, sigma = process.add_noise(ones, zeros, time), process.add_noise(zeros, ones, time)
        gain = std**2 * signal / (signal**2 * std**2 + sigma**2)
        x0 = mean + gain * (x - signal * mean)
        eps = (x - signal * x0) / sigma
        return process.target(x0, eps, time)

    return denoise


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samples_have_the_right_mean_and_spread(prediction, sampler):
    process = make_process(prediction, 200)
    denoise = exact_denoiser(process, prediction, 1.5, 0.5)
    noise = jax.random.normal(jax.random.key(2), (4000, 1))
    samples = process.sample(denoise, noise, 100, sampler, jax.random.key(3))
    assert abs(float(samples.mean()) - 1.5) < 0.05
    assert abs(float(samples.std()) - 0.5) < 0.05


def test_ancestral_samples_depend_on_the_key_and_ddim_does_not():
    process = make_process("x0", 50)
    denoise = exact_denoiser(process, "x0", 0.0, 1.0)
    noise = jnp.ones((3, 2))
    runs = {
        sampler: [process.sample(denoise, noise, 10, sampler, jax.random.key(k)) for k in (0, 1)]
        for sampler in SAMPLERS
    }
    np.testing.assert_array_equal(*runs["ddim"])
    assert float(jnp.abs(runs["ancestral"][0] - runs["ancestral"][1]).max()) > 0.1


COUNTS = (1, 2, 7, 60, 61, 103, 999, 1000)


@pytest.mark.parametrize(
    "counts", [COUNTS, pytest.param(range(1, 1001), marks=pytest.mark.slow)], ids=["some", "all"]
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_model_ends_at_the_data_for_every_number_of_steps(prediction, counts):
    process = make_process(prediction, 1000)
    data, noise = jax.random.normal(jax.random.key(0), (2, 3, 8))

    def perfect(x, time):
        zeros, ones = jnp.zeros_like(x), jnp.ones_like(x)
        signal, sigma = process.add_noise(ones, zeros, time), process.add_noise(zeros, ones, time)
        return process.target(data, (x - signal * data) / sigma, time)

    for count in counts:
        found = process.sample(perfect, noise, count, "ddim", jax.random.key(1))
        assert float(jnp.abs(found - data).max()) <= 1e-5, count


def test_unknown_names():
    with pytest.raises(ValueError, match="prediction is 'eps'"):
        make_process("eps")
    with pytest.raises(ValueError, match="sampler is 'euler'"):
        make_process("x0").sample(lambda x, t: x, jnp.ones((1, 2)), 2, "euler", jax.random.key(0))
