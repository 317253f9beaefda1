"""Many LoRAs at once are what each would be alone, and a killed run loses nothing."""

import jax
import numpy as np
import pytest

from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.fit import Base, Concepts, Plan, fit_loras
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.errors import UserError

RECIPE = Recipe(num_steps=50, images_per_step=2, learning_rate=1e-2, alpha=4.0)


def fit(world, concepts, num_slots, recipe=RECIPE, **kwargs):
    unet, params, schedule, spec, arrays = world
    of_concepts = {k: kwargs.pop(k) for k in ("max_images", "name", "reject") if k in kwargs}
    return fit_loras(
        Base(unet, params, schedule),
        recipe.factors(spec),
        recipe,
        Concepts(concepts, lambda number: arrays[number], **of_concepts),
        Plan(num_slots, steps_per_call=25, progress=None, **kwargs),
    )


@pytest.fixture(name="alone", scope="module")
def _alone(world):
    return {k: next(iter(fit(world, [k], 1))) for k in (0, 1, 3)}


def assert_same(first, second, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), first.lora, second.lora)


def test_at_once_equals_one_at_a_time(world, alone):
    together = {f.index: f for f in fit(world, range(5), 2)}
    assert sorted(together) == [0, 1, 2, 3, 4]
    for k, fitted in alone.items():  # 3 was handed a slot that another concept had used
        assert_same(together[k], fitted, 1e-5)
        np.testing.assert_allclose(together[k].losses, fitted.losses, rtol=1e-4)
        assert len(fitted.losses) == 50
    ups = [x["up"] for x in jax.tree.leaves(together[0].lora, is_leaf=lambda t: "up" in t)]
    assert max(np.abs(up).max() for up in ups) > 1e-2, "nothing was learned"


def test_restart_continues_unfinished_slots(world, alone, tmp_path):
    state = tmp_path / "slots.safetensors"
    running = fit(world, [0, 1], 2, state_file=state, save_every_steps=25)
    real_advance, calls = slot_state.advance, []

    def killed_after_one_save(*args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real_advance(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_state, "advance", killed_after_one_save)
        with pytest.raises(KeyboardInterrupt):
            next(running)
    assert state.exists()
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            slot_state,
            "advance",
            lambda *a, **k: (steps.append(k["num_steps"]), real_advance(*a, **k))[1],
        )
        resumed = {f.index: f for f in fit(world, [0, 1], 2, state_file=state)}
    assert sum(steps) == 25, "the saved steps were not made again"
    for k in (0, 1):
        assert_same(resumed[k], alone[k], 1e-6)
        np.testing.assert_allclose(resumed[k].losses, alone[k].losses, rtol=1e-4)
    assert not state.exists()


def test_state_of_another_run_is_refused(world, tmp_path):
    state = tmp_path / "slots.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        real_advance, calls = slot_state.advance, []

        def once(*args, **kwargs):
            if calls:
                raise KeyboardInterrupt
            calls.append(1)
            return real_advance(*args, **kwargs)

        patch.setattr(slot_state, "advance", once)
        with pytest.raises(KeyboardInterrupt):
            next(fit(world, [0, 1], 2, state_file=state, save_every_steps=25))
    with pytest.raises(UserError, match="made with seed = 0, this run has seed = 7"):
        next(fit(world, [0, 1], 2, state_file=state, seed=7))


def test_no_picture_is_dropped_in_silence(world):
    with pytest.raises(UserError, match="concept 0 has 3 images, expected 1 to 2"):
        next(fit(world, [1, 0], 2))
    with pytest.raises(UserError, match="concept 0 has 3 images, expected 1 to 1"):
        next(fit(world, [0], 1, max_images=1))


def test_steps_per_call_must_divide(world):
    with pytest.raises(UserError, match="got 30, expected a multiple of"):
        next(fit(world, [0], 1, recipe=Recipe(num_steps=30)))
