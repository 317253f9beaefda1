import numpy as np
import pytest

from hyperlora_jax.batches.mixing import MixedSubjects
from hyperlora_jax.errors import UserError


def groups(*sizes):
    """Subjects 1000, 1001, … of the second group, and so on."""
    return [1000 * k + np.arange(size) for k, size in enumerate(sizes)]


def test_datasets_are_mixed_by_weight_and_each_is_walked_in_epochs():
    subjects = MixedSubjects(groups(7, 3), [3, 1], seed=0).at(np.arange(2048))
    datasets, records = np.divmod(subjects, 1000)
    assert (datasets == 1).mean() == 0.25
    for k, size in enumerate((7, 3)):
        mine = records[datasets == k]
        mine = mine[: len(mine) // size * size].reshape(-1, size)
        assert all(sorted(epoch) == list(range(size)) for epoch in mine)


def test_rare_datasets_come_at_least_once():
    subjects = MixedSubjects(groups(4, 4, 4), [1e-9, 1, 1], seed=0).at(np.arange(1024))
    assert set((subjects // 1000).tolist()) == {0, 1, 2}


def test_wrong_mixtures_are_named():
    with pytest.raises(UserError, match="3 weights given for 2 datasets"):
        MixedSubjects(groups(7, 3), [1, 1, 1], 0)
    with pytest.raises(UserError, match="expected positive numbers"):
        MixedSubjects(groups(7, 3), [1, 0], 0)
