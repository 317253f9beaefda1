import itertools

import numpy as np
import pytest

from hyperlora_jax.batches.mixing import MixedOrder, mixed_batches
from hyperlora_jax.errors import UserError


def take(iterator, count):
    return list(itertools.islice(iterator, count))


SETS = [{"x": np.arange(7.0)}, {"x": 100 + np.arange(3.0)}]


def test_datasets_are_mixed_by_weight_and_each_is_walked_in_epochs():
    datasets, records = MixedOrder([7, 3], [3, 1], seed=0).at(np.arange(2048))
    assert (datasets == 1).mean() == 0.25
    for k, size in enumerate((7, 3)):
        mine = records[datasets == k]
        mine = mine[: len(mine) // size * size].reshape(-1, size)
        assert all(sorted(epoch) == list(range(size)) for epoch in mine)


def test_rare_datasets_come_at_least_once():
    datasets, _ = MixedOrder([4, 4, 4], [1e-9, 1, 1], seed=0).at(np.arange(1024))
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
    own = np.array([0, 3])
    for batch, part in zip(whole, mixed_batches(SETS, [0.5, 0.5], 4, 3, own), strict=False):
        np.testing.assert_array_equal(part["x"], batch["x"][own])


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
