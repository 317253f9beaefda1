import numpy as np

from hyperlora_jax.batches import ragged
from hyperlora_jax.batches.ragged import Ragged

COUNTS = [3, 1, 2]
ROWS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
OWN = np.split(ROWS, [3, 4])


def test_every_subject_has_its_own_rows(monkeypatch):
    found = Ragged(ragged.offsets_of(COUNTS), {"x": ROWS})
    assert len(found) == 3 and found.counts.tolist() == COUNTS
    for k, own in enumerate(OWN):
        np.testing.assert_array_equal(found.of(k)["x"], own)
    picked = found.at(np.array([2, 0]), np.array([[1, 1], [2, 0]]))["x"]
    np.testing.assert_array_equal(picked, [[OWN[2][1], OWN[2][1]], [OWN[0][2], OWN[0][0]]])
    np.testing.assert_array_equal(found.first("x")[:], [own[0] for own in OWN])
    for at_once in (1, 2, 8):
        monkeypatch.setattr(ragged, "SUBJECTS_AT_ONCE", at_once)
        np.testing.assert_allclose(found.means("x"), [own.mean(0) for own in OWN], rtol=1e-6)
