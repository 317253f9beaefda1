import os

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax import storage
from hyperlora_jax.data import encoding_cache, image_folder
from hyperlora_jax.data.lazy_pictures import LazyPictures
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.embedded import load_base


@pytest.fixture(name="plain")
def _plain():
    return np.random.default_rng(0).integers(0, 255, (7, 2, 4, 5, 3), np.uint8)


def test_it_is_indexed_like_an_array_and_reads_only_what_is_asked_for(plain):
    asked = []

    def load(k):
        asked.append(k)
        return plain[k]

    lazy = LazyPictures([lambda k=k: load(k) for k in range(7)], (2, 4, 5), "mark")
    assert (lazy.shape, lazy.dtype, len(lazy), lazy.ndim) == (plain.shape, plain.dtype, 7, 5)
    assert not asked
    np.testing.assert_array_equal(lazy[3], plain[3])
    np.testing.assert_array_equal(lazy[-1, 0], plain[-1, 0])
    assert len(asked) == 2
    asked.clear()
    np.testing.assert_array_equal(lazy[2:5], plain[2:5])
    assert sorted(asked) == [2, 3, 4]
    chosen = np.array([5, 0, 5])
    np.testing.assert_array_equal(lazy[chosen], plain[chosen])
    np.testing.assert_array_equal(lazy[1:3, :, ::-1], plain[1:3, :, ::-1])
    assert lazy[7:].shape == (0, 2, 4, 5, 3)
    np.testing.assert_array_equal(np.asarray(lazy), plain)
    half = lazy.map(lambda own: own[:1] // 2, 1, "half")
    np.testing.assert_array_equal(half[1:], plain[1:, :1] // 2)
    assert half.shape == (7, 1, 4, 5, 3) and half.mark != lazy.mark


def test_marks_follow_the_files_not_the_copy(tmp_path, monkeypatch):
    folder = tmp_path / "anna"
    folder.mkdir()
    file = folder / "0.png"
    Image.new("RGB", (8, 8)).save(file)

    def mark():
        return image_folder.open_concept(folder, ((4, 4),)).mark

    first = mark()
    os.utime(file, ns=(1, 1))
    assert mark() != first, "an edited picture is another one"
    monkeypatch.setattr(storage, "cache_folder", lambda: tmp_path)
    copied = mark()
    os.utime(file, ns=(2, 2))
    assert mark() == copied, "copies of one file in a bucket are the same"
    Image.new("RGB", (9, 200), (1, 2, 3)).save(file)
    assert mark() != copied


def test_pictures_that_cannot_be_read_are_named_when_they_are_asked_for(tmp_path):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "0.png").write_bytes(b"no picture")
    concept = image_folder.open_concept(tmp_path / "anna", ((4, 4),))
    with pytest.raises(UserError, match=r"0\.png"):
        concept.pixels()


def test_pictures_of_one_file_fit_into_memory(plain, tmp_path, monkeypatch):
    sizes = []

    def encode_pictures(sd, encoder, images, *rest):
        sizes.append(images.nbytes)
        shapes = {"latents": (1, 1, 1), "pooled": (1,), "tokens": (1, 1)}
        rows = images.shape[:2]
        return {name: np.zeros((*rows, *shape), np.float32) for name, shape in shapes.items()}

    replaced = encoding_cache.encoded_subjects
    monkeypatch.setattr(replaced, "encode_pictures", encode_pictures)
    monkeypatch.setattr(replaced, "encode_texts", lambda *_: np.zeros((2, 1, 1), np.float32))
    monkeypatch.setattr(encoding_cache, "CHUNK_BYTES", 4 * 60)
    lazy = LazyPictures([lambda k=k: plain[k] for k in range(7)], (2, 4, 5), "mark")
    ids = [str(k) for k in range(7)]
    found = encoding_cache.encode_once(
        tmp_path, load_base("tiny-sd"), None, ids, lazy, [["a", "b"]] * 7
    )
    assert found.latents.shape == (7, 2, 1, 1, 1)
    assert sizes == [240, 240, 240, 120]
