import numpy as np
import pytest

from hyperlora_jax.hypernet import baselines


class Read:
    """Rows that come from somewhere, and how many at most are asked for at a time."""

    def __init__(self, array):
        self._array, self.most = array, 0

    def __len__(self):
        return len(self._array)

    def __getitem__(self, rows):
        found = self._array[rows]
        self.most = max(self.most, len(found))
        return found


@pytest.fixture
def vectors(monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK", 7)
    return np.random.default_rng(0).normal(3, 1, (33, 50)).astype(np.float32)


def test_mean_is_that_of_the_whole_array_to_the_last_bit(vectors):
    read = Read(vectors)
    np.testing.assert_array_equal(baselines.mean_vector(read), vectors.mean(axis=0))
    assert read.most == 7


def test_inner_products_and_sums_are_those_of_the_whole_array(vectors):
    read, centre = Read(vectors), vectors.mean(axis=0)
    whole = (vectors - centre).astype(np.float64)
    np.testing.assert_allclose(
        baselines.gram_matrix(read, centre, np.float64), whole @ whole.T, rtol=1e-12, atol=1e-12
    )
    weights = np.random.default_rng(1).normal(size=(4, 33))
    found = baselines.combined(weights, read, centre)
    np.testing.assert_allclose(found, weights @ whole, rtol=1e-12, atol=1e-12)
    assert read.most == 7
