import os

import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import image_folder, lazy_pictures
from hyperlora_jax.pictures.lazy_pictures import LazyPictures

COUNTS = (2, 1, 4, 1, 3)


@pytest.fixture(name="plain")
def _plain():
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (count, 4, 5, 3), np.uint8) for count in COUNTS]


def test_only_what_is_asked_for_is_read(plain):
    asked = []

    def load(k):
        asked.append(k)
        return list(plain[k])

    lazy = LazyPictures([lambda k=k: load(k) for k in range(5)], COUNTS, (4, 5), "mark")
    assert (len(lazy), lazy.counts, lazy.size) == (5, COUNTS, (4, 5)) and not asked
    np.testing.assert_array_equal(lazy[2], plain[2])
    assert asked == [2]
    asked.clear()
    some = list(lazy.one_by_one(range(1, 4)))
    np.testing.assert_array_equal(some, np.concatenate(plain[1:4]))
    assert sorted(asked) == [1, 2, 3]
    half = lazy.map(lambda own: own[:, :2], "half", size=(2, 5))
    np.testing.assert_array_equal(half[4], plain[4][:, :2])
    twice = lazy.map(lambda own: np.repeat(own, 2, axis=0), "twice", times=2)
    assert twice.counts == (4, 2, 8, 2, 6) and twice[0].shape == (4, 4, 5, 3)
    assert len({lazy.mark, half.mark, twice.mark}) == 3
    wrong = LazyPictures([lambda: plain[0]], (3,), (4, 5), "mark")
    with pytest.raises(ValueError, match="expected \\(3, 4, 5, 3\\)"):
        _ = wrong[0]


def test_reading_runs_only_a_little_ahead(plain):
    asked = []
    many = 1000
    lazy = LazyPictures([lambda: asked.append(0) or plain[1]] * many, [1] * many, (4, 5), "mark")
    reading = lazy.one_by_one(range(many))
    next(reading)
    assert len(asked) <= 4 * (os.cpu_count() or 1)
    reading.close()


def test_pictures_in_memory(plain):
    images = np.stack([plain[0], plain[2][:2]])
    lazy = lazy_pictures.of_array(images)
    assert lazy.counts == (2, 2) and lazy.size == (4, 5)
    np.testing.assert_array_equal(lazy[1], images[1])
    assert lazy.mark != lazy_pictures.of_array(images + 1).mark


def test_pictures_that_cannot_be_read_are_named_when_they_are_asked_for(tmp_path):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "0.png").write_bytes(b"no picture")
    concept = image_folder.open_concept(tmp_path / "anna", ((4, 4),))
    with pytest.raises(UserError, match=r"0\.png"):
        concept.pixels()
    with pytest.raises(UserError, match=r"0\.png"):
        concept.references_at((4, 4))
