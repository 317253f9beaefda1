"""Every scheduler of the installed diffusers: its schedule is ours, or it is refused."""

import inspect
import logging

import diffusers
import numpy as np
import pytest
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from hyperlora_jax.diffusion import scheduler_config as table
from hyperlora_jax.diffusion.schedule import SAMPLER_OF, NoiseSchedule
from hyperlora_jax.diffusion.scheduler_config import read_scheduler_config
from hyperlora_jax.errors import UserError

SCHEDULERS = {
    name: kind
    for name in dir(diffusers)
    if "Scheduler" in name
    and inspect.isclass(kind := getattr(diffusers, name, None))
    and issubclass(kind, SchedulerMixin)
    and kind is not SchedulerMixin
}
READ = {name: kind for name, kind in SCHEDULERS.items() if name in table.CLASSES}
SD = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # fmt: skip


def arguments(kind):
    given = inspect.signature(kind.__init__).parameters
    return {name: p.default for name, p in given.items() if name not in ("self", "args", "kwargs")}


def test_every_argument_of_the_schedulers_that_are_read_is_in_one_table():
    assert len(READ) >= 18
    tables = [table.HONOURED, table.REFUSED, table.NOT_HONOURED, table.HARMLESS]
    for name, kind in READ.items():
        for key in arguments(kind):
            assert sum(key in rows for rows in tables) == 1, f"{name}: {key}"


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # KDPM2 with NumPy 2
@pytest.mark.parametrize("name", sorted(READ))
def test_a_default_config_gives_the_class_its_own_schedule(name):
    theirs = READ[name]()
    for config in (dict(theirs.config), {}):
        ours = read_scheduler_config({"_class_name": name, **config})
        np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4)
        for field in set(table.HONOURED) & set(arguments(READ[name])) - {"timestep_spacing"}:
            assert getattr(ours, field) == theirs.config[field], field


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - set(READ)))
def test_other_kinds_of_schedule_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"scheduler {name}: has no discrete schedule"):
        read_scheduler_config({"_class_name": name})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("timestep_type", "continuous"), ("use_flow_sigmas", True), ("sigma_data", 0.5),
        ("sigma_max", 120.0), ("rho", 7.0), ("use_dynamic_shifting", True), ("shift", 3.0),
        ("prediction_type", "flow_prediction"), ("never_heard_of", 1), ("sigma_schedule", "karras"),
        ("predict_epsilon", False),
    ],
)  # fmt: skip
def test_values_that_mean_another_schedule_are_refused(key, value):
    with pytest.raises(UserError, match=f"{key}.*{value}"):
        read_scheduler_config({**SD, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_train_timesteps", "1000"), ("beta_start", "0.1"), ("trained_betas", "linear"),
        ("steps_offset", True), ("rescale_betas_zero_snr", 1), ("prediction_type", 3),
        ("trained_betas", [0.1, 0.2]),
    ],
)  # fmt: skip
def test_values_of_another_type_or_length_are_named(key, value):
    with pytest.raises(UserError, match=key):
        read_scheduler_config({**SD, key: value})


@pytest.mark.parametrize("key", sorted(table.NOT_HONOURED))
def test_what_is_not_honoured_is_said_unless_it_changes_nothing(key, caplog):
    same, classes = table.NOT_HONOURED[key]
    other = (not same[0]) if isinstance(same[0], bool) else "other"
    for kind in SAMPLER_OF:
        config = {**SD, "_class_name": kind, "skip_prk_steps": True}
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = [read_scheduler_config({**config, key: v}) for v in same]
            assert not caplog.records
            found.append(read_scheduler_config({**config, key: other}))
        assert all(isinstance(schedule, NoiseSchedule) for schedule in found)
        assert len(caplog.records) == (not classes or kind in classes)
        assert all(key in record.getMessage() for record in caplog.records)


def test_a_class_without_a_sampler_here_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        for kind in sorted(set(table.CLASSES) - set(SAMPLER_OF)):
            assert read_scheduler_config({**SD, "_class_name": kind}).sampler == "ddim"
            assert f"no sampler draws as {kind} does" in caplog.records.pop().getMessage()
        # Without the key PyTorch takes Runge-Kutta steps.
        assert read_scheduler_config({**SD, "_class_name": "PNDMScheduler"}).sampler == "pndm"
        assert "skip_prk_steps = False is not honoured" in caplog.text
