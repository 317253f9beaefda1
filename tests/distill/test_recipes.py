"""Accumulation, prior preservation and plateaus, each against what it is defined to equal."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.cli.config import load_config
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.distillation import make_recipe
from hyperlora_jax.distill.fit import Base, Concepts, Plan, fit_loras, on_plateau
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
PLAIN = Recipe(num_steps=4, images_per_step=2, learning_rate=1e-2)


def fit(world, recipe, concepts=(0,), **kwargs):
    unet, params, schedule, spec, arrays = world
    fitted = fit_loras(
        Base(unet, params, schedule),
        recipe.factors(spec),
        recipe,
        Concepts(list(concepts), lambda k: arrays[k]),
        Plan(1, steps_per_call=2, progress=None),
        **kwargs,
    )
    return {done.index: done for done in fitted}


def assert_lora(first, second, equal=True):
    pairs = zip(jax.tree.leaves(first.lora), jax.tree.leaves(second.lora), strict=True)
    worst = max(float(np.abs(a - b).max()) for a, b in pairs)
    assert (worst < 1e-5) == equal, worst


def test_accumulated_batches_are_averaged(world, monkeypatch):
    """Two equal batches give the step of one; two different ones another."""
    draw = slot_state._draw

    def same(key, *args, **kwargs):
        del key
        return draw(jax.random.key(3), *args, **kwargs)

    recipe = dataclasses.replace(PLAIN, learning_rate=1.1e-2)  # traced anew, with the patch
    plain = fit(world, PLAIN)[0]
    assert_lora(fit(world, dataclasses.replace(PLAIN, accumulate=2))[0], plain, equal=False)
    monkeypatch.setattr(slot_state, "_draw", same)
    plain = fit(world, recipe)[0]
    twice = fit(world, dataclasses.replace(recipe, accumulate=2))[0]
    assert_lora(twice, plain)
    np.testing.assert_allclose(twice.losses, plain.losses, rtol=1e-4)


def test_a_prior_of_weight_zero_changes_nothing_and_another_does(world):
    arrays = world[4]
    prior = (arrays[1][0], arrays[1][1])
    plain = fit(world, PLAIN)[0]
    faint = fit(world, dataclasses.replace(PLAIN, prior_weight=1e-12), prior=prior)[0]
    assert_lora(faint, plain)
    np.testing.assert_allclose(faint.losses, plain.losses, rtol=1e-4)
    held = fit(world, dataclasses.replace(PLAIN, prior_weight=1.0), prior=prior)[0]
    assert_lora(held, plain, equal=False)
    for recipe, given in ((PLAIN, prior), (dataclasses.replace(PLAIN, prior_weight=1.0), None)):
        with pytest.raises(UserError, match="expected both or neither"):
            fit(world, recipe, prior=given)


def test_a_plateau_ends_a_fit_and_the_slot_goes_on_with_the_next(world):
    """A drop of 100 % is never reached: both fits end after two windows."""
    recipe = dataclasses.replace(PLAIN, num_steps=8, plateau_window=2, plateau_drop=1.0)
    fitted = fit(world, recipe, (0, 2))
    assert sorted(fitted) == [0, 2]
    assert [len(done.losses) for done in fitted.values()] == [4, 4]
    assert_lora(fitted[2], fit(world, recipe, (2,))[2])
    falling = [np.array([4.0, 4.0]), np.array([2.0, 2.0])]
    assert not on_plateau(falling, dataclasses.replace(recipe, plateau_drop=0.1))
    assert not on_plateau(falling[:1], recipe)
    assert on_plateau(
        [*falling, np.array([1.9, 1.9])], dataclasses.replace(recipe, plateau_drop=0.1)
    )
    assert not on_plateau(falling[::-1], PLAIN)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("distill_w2w", {"alpha": 27.0, "num_steps": 800, "learning_rate": 1e-4,
                         "prior_weight": 1.0, "init_seed": 0}),
        ("distill_strong", {"accumulate": 2, "min_snr_gamma": 5.0, "plateau_window": 200}),
        ("avatars", {"images_per_step": 4, "prior_weight": 0.0}),
    ],
)  # fmt: skip
def test_the_configs_are_recipes(name, wanted):
    section = load_config(str(CONFIGS / f"{name}.py"), []).distill
    recipe = dataclasses.asdict(make_recipe(section))
    assert {key: recipe[key] for key in wanted} == wanted
    assert (section.preset, section.rank) == {
        "distill_w2w": ("w2w", 1), "distill_strong": ("attn-qkvo", 8), "avatars": (None, None)
    }[name]  # fmt: skip
    assert recipe["num_steps"] % section.steps_per_call == 0


def test_a_recomputing_bfloat16_base_keeps_float32_factors(world):
    unet, params, *rest = world
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    short = (unet.clone(dtype=jnp.bfloat16, remat="block"), half, *rest)
    found, plain = fit(short, PLAIN)[0], fit(world, PLAIN)[0]
    pairs = zip(jax.tree.leaves(found.lora), jax.tree.leaves(plain.lora), strict=True)
    for a, b in pairs:
        assert a.dtype == np.float32
        # In the mean: Adam's first steps make a whole step of a gradient that is nearly zero.
        assert np.abs(a - b).mean() < 0.1 * np.abs(b).mean()
    np.testing.assert_allclose(found.losses, plain.losses, rtol=2e-2)
    assert_lora(found, plain, equal=False)
