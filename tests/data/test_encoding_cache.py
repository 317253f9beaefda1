"""Latents and text states are encoded once, by whoever is there, and found again."""

import jax
import numpy as np
import pytest

from hyperlora_jax.data import encoding_cache
from hyperlora_jax.data.encoded_subjects import encode_pictures, encode_subjects
from hyperlora_jax.data.encoding_cache import encode_once
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.conditioning import load_condition_encoder
from hyperlora_jax.stable_diffusion.embedded import load_base

NAMES = ("latents", "text_index", "text_states", "pooled", "tokens")


@pytest.fixture(name="asked", scope="module")
def _asked():
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (5, 2, 16, 16, 3), np.uint8)
    captions = [[f"smiling {k % 3}", "open mouth"] for k in range(5)]
    ids = [f"person {k}" for k in range(5)]
    return load_base("tiny-sd"), load_condition_encoder("avatar"), ids, images, captions


@pytest.fixture(name="files_made")
def _files_made(monkeypatch):
    """Numbers of subjects of the files that were made, in their order."""
    made = []

    def counted(sd, encoder, images, *rest):
        made.append(len(images))
        return encode_pictures(sd, encoder, images, *rest)

    monkeypatch.setattr(encoding_cache.encoded_subjects, "encode_pictures", counted)
    monkeypatch.setattr(encoding_cache, "CHUNK", 4)  # pictures: two subjects
    return made


def only_folder(tmp_path):
    (folder,) = (tmp_path / "encoded").iterdir()
    return folder


def test_chunks_together_are_what_was_asked_for(asked, files_made, tmp_path):
    plain = encode_subjects(*asked, progress=False)
    files_made.clear()
    found = encode_once(tmp_path, *asked, batch_size=3)
    assert files_made == [2, 2, 1] and found.ids == plain.ids
    for name in NAMES:
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), atol=2e-5)
    again = encode_once(tmp_path, *asked)
    assert files_made == [2, 2, 1], "nothing is encoded twice"
    for name in NAMES:
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    (only_folder(tmp_path) / "00000002.npz").unlink()
    encode_once(tmp_path, *asked)
    assert files_made == [2, 2, 1, 2], "a restart makes what is missing"


def test_other_captions_pictures_or_encoder_are_another_folder(asked, files_made, tmp_path):
    sd, encoder, ids, images, captions = asked
    encode_once(tmp_path, *asked)
    encode_once(tmp_path, sd, None, ids, images, captions)
    encode_once(tmp_path, sd, encoder, ids, images + 1, captions)
    encode_once(tmp_path, sd, encoder, ids, images, [["other", "texts"]] * 5)
    assert len(list((tmp_path / "encoded").iterdir())) == 4


def test_hosts_share_the_files_out(asked, files_made, tmp_path, monkeypatch):
    whole = encode_once(tmp_path / "whole", *asked)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(encoding_cache.multihost, "agree", lambda name, value: value)
    waited = []

    def other_host(name, timeout_seconds):
        """While this one waits, the other one does its part."""
        waited.append(name)
        monkeypatch.setattr(encoding_cache.multihost, "barrier", lambda *_: None)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        monkeypatch.setattr(
            encoding_cache.multihost,
            "agree",
            lambda name, value: "[]" if name.endswith("found") else value,
        )
        encode_once(tmp_path / "shared", *asked)

    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(encoding_cache.multihost, "barrier", other_host)
    files_made.clear()
    with pytest.raises(UserError, match="cannot be read"):  # before the first host's is written
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        monkeypatch.setattr(encoding_cache.multihost, "barrier", lambda *_: None)
        encode_once(tmp_path / "alone", *asked)
    assert files_made == [2, 1], "the second host's: files 1 and 3 of text, 0, 2, 4"
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(encoding_cache.multihost, "barrier", other_host)
    files_made.clear()
    found = encode_once(tmp_path / "shared", *asked)
    assert waited and files_made == [2, 2, 1]
    for name in NAMES:
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def test_a_damaged_file_is_named(asked, files_made, tmp_path):
    encode_once(tmp_path, *asked)
    file = only_folder(tmp_path) / "00000000.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"00000000\.npz: cannot be read"):
        encode_once(tmp_path, *asked)
