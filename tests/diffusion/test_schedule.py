import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from hyperlora_jax.diffusion.schedule import add_noise, target, to_eps, to_x0
from hyperlora_jax.diffusion.scheduler_config import read_scheduler_config
from hyperlora_jax.errors import UserError

CONFIGS = {
    "sd15": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "zero-snr": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_schedule_noise_and_target_equal_diffusers(name):
    theirs = DDIMScheduler(**CONFIGS[name], clip_sample=False)
    ours = read_scheduler_config(dict(theirs.config))
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 5, 3, 3, 4)).astype(np.float32)
    steps = np.array([0, 10, 500, 900, 999])
    noisy = add_noise(ours, x0, noise, steps)
    args = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(steps)
    np.testing.assert_allclose(noisy, theirs.add_noise(*args), atol=1e-5)
    prediction = target(ours, x0, noise, steps)
    if ours.prediction_type == "v_prediction":
        np.testing.assert_allclose(prediction, theirs.get_velocity(*args), atol=1e-5)
    last = 5 if ours.prediction_type == "v_prediction" else 3
    back = to_x0(ours, prediction, noisy, steps)
    np.testing.assert_allclose(back[:last], x0[:last], atol=1e-4)
    first = 1 if ours.prediction_type == "sample" else 0  # sigma is about 0 at step 0
    again = to_eps(ours, prediction, noisy, steps)
    np.testing.assert_allclose(again[first:], noise[first:], atol=1e-3)


def test_zero_snr_ends_at_pure_noise():
    schedule = read_scheduler_config(CONFIGS["zero-snr"])
    assert schedule.alphas_cumprod[-1] == 0.0
    assert float(schedule.snr(jnp.array([999]))[0]) == 0.0


def test_config_survives_a_round_trip():
    schedule = read_scheduler_config(CONFIGS["zero-snr"])
    assert read_scheduler_config(schedule.to_config()) == schedule
    assert hash(read_scheduler_config({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"prediction_type": "flow"}, "prediction_type = 'flow'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing = 'karras'"),
        ({"rescale_betas_zero_snr": True}, "needs prediction_type"),
    ],
)
def test_unsupported_values_are_named(config, message):
    with pytest.raises(UserError, match=message):
        read_scheduler_config(config)
