import itertools

import numpy as np
import pytest

from hyperlora_jax.data.augmentation import (
    PictureAugmentation,
    VectorAugmentation,
    augmented_batches,
)
from hyperlora_jax.data.mixing import MixedOrder, mixed_batches
from hyperlora_jax.errors import UserError


def take(iterator, count):
    return list(itertools.islice(iterator, count))


SETS = [{"x": np.arange(7.0)}, {"x": 100 + np.arange(3.0)}]


def test_datasets_are_mixed_by_weight_and_each_is_walked_in_epochs():
    datasets, records = MixedOrder([7, 3], [3, 1], seed=0).records(0, 2048)
    assert (datasets == 1).mean() == 0.25
    for k, size in enumerate((7, 3)):
        mine = records[datasets == k]
        mine = mine[: len(mine) // size * size].reshape(-1, size)
        assert all(sorted(epoch) == list(range(size)) for epoch in mine)


def test_rare_datasets_come_at_least_once():
    datasets, _ = MixedOrder([4, 4, 4], [1e-9, 1, 1], seed=0).records(0, 1024)
    assert set(datasets.tolist()) == {0, 1, 2}


def test_mixed_batches_resume_and_shard():
    iterator = mixed_batches(SETS, [0.5, 0.5], 4, seed=3)
    whole = take(iterator, 6)
    for batch in whole:
        expected = batch["dataset_id"] * 100 + batch["record_id"]
        np.testing.assert_array_equal(batch["x"], expected)
    fresh = mixed_batches(SETS, [0.5, 0.5], 4, seed=3)
    take(fresh, 2)
    state = fresh.get_state()
    again = mixed_batches(SETS, [0.5, 0.5], 4, seed=3)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["x"], whole[2]["x"])
    halves = [take(mixed_batches(SETS, [0.5, 0.5], 4, 3, k, 2), 6) for k in range(2)]
    for step, batch in enumerate(whole):
        both = np.concatenate([half[step]["x"] for half in halves])
        np.testing.assert_array_equal(both, batch["x"])


def test_wrong_mixtures_are_named():
    with pytest.raises(UserError, match="3 weights given for 2 datasets"):
        mixed_batches(SETS, [1, 1, 1], 4, 0)
    with pytest.raises(UserError, match="expected positive numbers"):
        mixed_batches(SETS, [1, 0], 4, 0)
    with pytest.raises(UserError, match="no datasets to mix"):
        mixed_batches([], [], 4, 0)
    with pytest.raises(UserError, match="dataset 1 has the arrays"):
        mixed_batches([SETS[0], {"y": np.zeros(3)}], [1, 1], 4, 0)


ARRAYS = {
    "lora": np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32),
    "embedding": np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32),
    "number": np.arange(20),
}


def test_mixtures_share_their_weights_and_stay_in_the_hull():
    both = {"both": np.concatenate([ARRAYS["lora"], ARRAYS["embedding"]], axis=1), **ARRAYS}
    augmentation = VectorAugmentation(mixed=("both", "lora", "embedding"), probability=0.5)
    seen = []
    for batch in take(augmented_batches(both, augmentation, 8, seed=0), 20):
        np.testing.assert_allclose(batch["both"][:, :6], batch["lora"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch["both"][:, 6:], batch["embedding"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch["number"], batch["record_id"])
        alone = batch["mixture_weight"] == 1
        np.testing.assert_array_equal(batch["lora"][alone], ARRAYS["lora"][batch["number"][alone]])
        assert (batch["lora"].max(0) <= ARRAYS["lora"].max(0) + 1e-5).all()
        seen.append(alone.mean())
    assert 0.35 < np.mean(seen) < 0.65


def test_noise_has_the_given_size_per_element():
    scale = np.linspace(0.1, 2, 6).astype(np.float32)
    augmentation = VectorAugmentation(noise={"lora": 0.5}, scale={"lora": scale})
    added = [
        batch["lora"] - ARRAYS["lora"][batch["record_id"]]
        for batch in take(augmented_batches(ARRAYS, augmentation, 10, seed=0), 60)
    ]
    np.testing.assert_allclose(np.concatenate(added).std(0), 0.5 * scale, rtol=0.1)


def test_augmented_batches_are_reproducible_and_sharded():
    augmentation = VectorAugmentation(mixed=("lora",), noise={"lora": 0.1})
    whole = take(augmented_batches(ARRAYS, augmentation, 8, 0), 4)
    halves = [take(augmented_batches(ARRAYS, augmentation, 8, 0, k, 2), 4) for k in range(2)]
    for step, batch in enumerate(whole):
        both = np.concatenate([half[step]["lora"] for half in halves])
        np.testing.assert_allclose(both, batch["lora"], rtol=1e-6)


def test_wrong_augmentations_are_named():
    with pytest.raises(UserError, match=r"augmentation of \['image'\], the arrays are"):
        augmented_batches(ARRAYS, VectorAugmentation(mixed=("image",)), 4, 0)
    with pytest.raises(UserError, match="mixture probability is 2"):
        VectorAugmentation(probability=2.0)
    with pytest.raises(UserError, match="mixtures of 1 with concentration"):
        VectorAugmentation(num_mixed=1)


def test_pictures_are_flipped_moved_and_recoloured():
    ramp = np.tile(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (8, 1, 3))
    generator = np.random.default_rng(0)
    flipped = PictureAugmentation(flip=1.0).apply(ramp, generator)
    np.testing.assert_array_equal(flipped, ramp[:, ::-1])
    np.testing.assert_array_equal(PictureAugmentation(flip=0.0).apply(ramp, generator), ramp)
    moved = [PictureAugmentation(flip=0.0, shift=2).apply(ramp, generator) for _ in range(30)]
    assert {int(p[0, 8, 0]) for p in moved} == {60, 70, 80, 90, 100}
    changed = PictureAugmentation(0.0, 0, 0.2, 0.2, 3.0).apply(ramp, generator)
    assert changed.dtype == np.uint8 and (changed != ramp).any()
    assert np.abs(changed.astype(int) - ramp).max() < 90
    batch = np.stack([ramp, ramp])
    once = PictureAugmentation(0.5, 2, 0.1).apply_all(batch, seed=1, step=5)
    again = PictureAugmentation(0.5, 2, 0.1).apply_all(batch, seed=1, step=5)
    np.testing.assert_array_equal(once, again)
