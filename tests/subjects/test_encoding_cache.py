"""Latents, conditions and captions are encoded once, by whoever is there, and found again."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from hyperlora_jax.batches import ragged
from hyperlora_jax.batches.ragged import Ragged
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.pictures.lazy_pictures import LazyPictures
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.subjects import encoding_cache
from hyperlora_jax.subjects.encoded_subjects import EncodedSubjects, encode_subjects
from hyperlora_jax.subjects.encoding_cache import encode_once
from hyperlora_jax.subjects.subject_pictures import SubjectPictures

SHOWN, GIVEN = (1, 3, 2, 2, 1), (2, 1, 1, 3, 2)


def pictures_of(seed=0, captions=None, ids=None):
    """Five subjects with other references than targets, of each its own number."""
    random = np.random.default_rng(seed)
    shown = [random.integers(0, 255, (count, 16, 16, 3), np.uint8) for count in SHOWN]
    given = [random.integers(0, 255, (count, 16, 16, 3), np.uint8) for count in GIVEN]

    def lazy(images, mark):
        loads = [lambda own=own: own for own in images]
        return LazyPictures(loads, [len(own) for own in images], (16, 16), f"{mark} {seed}")

    ids = ids or tuple(f"person {k}" for k in range(5))
    words = captions or [f"smiling {k % 3}" for k in range(5)]
    made = SubjectPictures(
        ids=ids,
        identities=ids,
        images=lazy(shown, "shown"),
        captions=tuple((word,) * count for word, count in zip(words, SHOWN, strict=True)),
        references=((),) * 5,
        seen_at=lambda size: lazy(given, f"given {size}"),
        numbers=tuple(range(5)),
        facts={},
    )
    return made, shown, given


@pytest.fixture(name="sd", scope="module")
def _sd():
    return load_base("tiny-sd")


@pytest.fixture(name="encoder", scope="module")
def _encoder():
    return load_condition_encoder("avatar")


@pytest.fixture(name="made")
def _made(monkeypatch):
    """(kind, numbers of the subjects) of the files that were made, in their order."""
    made, plain = [], encoding_cache._Part.make

    def counted(part, file, subjects, batch_size):
        made.append((part.name.split("-")[0], [*subjects]))
        plain(part, file, subjects, batch_size)

    monkeypatch.setattr(encoding_cache._Part, "make", counted)
    monkeypatch.setattr(encoding_cache, "CHUNK", 4)  # pictures
    return made


LATENTS = [("latents", [0, 1]), ("latents", [2, 3]), ("latents", [4])]
CONDITIONS = [("conditions", [0, 1, 2]), ("conditions", [3]), ("conditions", [4])]
TEXTS = [("texts", [0, 1, 2])]


def rows(found: EncodedSubjects) -> dict[str, np.ndarray]:
    arrays = {}
    for part in (found.references, found.targets):
        arrays |= flatten_dict(dict(part.arrays), sep="/")
    return {name: np.asarray(array[:]) for name, array in arrays.items()}


def assert_same(found, expected, tolerance=0.0):
    found, expected = rows(found), rows(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=tolerance, rtol=0)


def test_files_together_are_what_was_asked_for(sd, encoder, made, tmp_path):
    pictures, shown, given = pictures_of()
    found = encode_once(tmp_path, sd, pictures, encoder=encoder, batch_size=3)
    assert made == [*CONDITIONS, *LATENTS, *TEXTS]
    assert found.targets.counts.tolist() == list(SHOWN)
    assert found.references.counts.tolist() == list(GIVEN)
    targets = encode_subjects(sd, pictures.ids, shown, pictures.captions)
    pooled, tokens = encoder.encode(np.concatenate(given) / np.float32(255))
    told = {"pooled": np.asarray(pooled), "tokens": np.asarray(tokens)}
    references = Ragged(ragged.offsets_of(GIVEN), told)
    expected = dataclasses.replace(targets, references=references)
    assert_same(found, expected, 2e-5)
    latents, text = found.concept(1)
    assert len(latents) == len(text["states"]) == 3
    made.clear()
    assert_same(encode_once(tmp_path, sd, pictures, encoder=encoder), found)
    assert not made, "nothing is encoded twice"
    (folder,) = (tmp_path / "encoded").glob("latents-*")
    (folder / "00000002.safetensors").unlink()
    encode_once(tmp_path, sd, pictures, encoder=encoder)
    assert made == [("latents", [2, 3])], "a restart makes what is missing"


def test_only_what_is_wanted_is_made(sd, encoder, made, tmp_path):
    pictures, _, _ = pictures_of()
    unusable = dataclasses.replace(sd, params={"unet": sd.params["unet"]})
    found = encode_once(tmp_path, unusable, pictures, encoder=encoder, latents=False, texts=False)
    assert {kind for kind, _ in made} == {"conditions"}
    assert found.targets is None
    made.clear()
    encode_once(tmp_path, sd, pictures, encoder=encoder)
    assert {kind for kind, _ in made} == {"latents", "texts"}, "conditions are there"


def test_other_captions_pictures_or_models_are_other_folders(sd, encoder, made, tmp_path):
    def folders():
        names = sorted(folder.name.split("-")[0] for folder in (tmp_path / "encoded").iterdir())
        return [names.count(kind) for kind in ("conditions", "latents", "texts")]

    pictures, _, _ = pictures_of()
    encode_once(tmp_path, sd, pictures, encoder=encoder)
    assert folders() == [1, 1, 1]
    encode_once(tmp_path, sd, pictures_of(seed=1)[0], encoder=encoder)
    assert folders() == [2, 2, 1]
    encode_once(tmp_path, sd, pictures_of(captions=["other"] * 5)[0], encoder=encoder)
    assert folders() == [2, 2, 2]
    other = pictures_of(ids=tuple("abcde"))[0]
    encode_once(tmp_path, sd, other, encoder=encoder, texts=False)
    assert folders() == [3, 3, 2]
    found = encode_once(tmp_path, sd, pictures, encoder=encoder, dtype=ml_dtypes.bfloat16)
    assert folders() == [4, 4, 3]
    exact = encode_once(tmp_path, sd, pictures, encoder=encoder)
    assert found.targets.arrays["latents"].dtype == ml_dtypes.bfloat16
    for name, array in rows(exact).items():
        np.testing.assert_allclose(rows(found)[name].astype(np.float32), array, rtol=2**-8)


def test_a_run_that_was_killed_goes_on(sd, encoder, made, tmp_path, monkeypatch):
    pictures, _, _ = pictures_of()
    one = make_mesh(devices=jax.local_devices()[:1])
    monkeypatch.setattr(encoding_cache, "local_mesh", lambda: one)
    whole = encode_once(tmp_path / "whole", sd, pictures, encoder=encoder, batch_size=1)
    made.clear()
    asked, encode = [], sd.encode_images

    def dies(images):
        asked.append(len(images))
        if len(asked) == 6:  # in the second file of latents, its first picture written
            raise KeyboardInterrupt
        return encode(images)

    monkeypatch.setattr(type(sd), "encode_images", lambda _, images: dies(images))
    with pytest.raises(KeyboardInterrupt):
        encode_once(tmp_path / "w", sd, pictures, encoder=encoder, batch_size=1)
    (folder,) = (tmp_path / "w" / "encoded").glob("latents-*")
    names = sorted(file.name for file in folder.iterdir())
    assert names == [".00000002.safetensors.partial", "00000000.safetensors"]
    made.clear()
    found = encode_once(tmp_path / "w", sd, pictures, encoder=encoder, batch_size=1)
    assert made == [("latents", [2, 3]), ("latents", [4]), *TEXTS]
    assert_same(found, whole)
    assert not list(folder.glob(".*"))


def test_hosts_share_the_files_out(sd, encoder, made, tmp_path, monkeypatch):
    pictures, _, _ = pictures_of()
    whole = encode_once(tmp_path / "whole", sd, pictures, encoder=encoder)
    parts: dict[int, list] = {}

    def run(index, folder):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        made.clear()
        found = encode_once(folder, sd, pictures, encoder=encoder)
        parts.setdefault(index, [*made])
        return found

    def other_host(name, timeout_seconds):
        """While this one waits, the other one does its part."""
        parts[0] = [*made]
        monkeypatch.setattr(encoding_cache.multihost, "barrier", lambda *_: None)
        nothing = lambda name, value: "[]" if name.endswith("found") else value  # noqa: E731
        monkeypatch.setattr(encoding_cache.multihost, "agree", nothing)
        run(1, tmp_path / "shared")
        monkeypatch.setattr(jax, "process_index", lambda: 0)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(encoding_cache.multihost, "agree", lambda name, value: value)
    monkeypatch.setattr(encoding_cache.multihost, "barrier", lambda *_: None)
    with pytest.raises(UserError, match="cannot be read"):  # the first host's are not there
        run(1, tmp_path / "alone")
    parts.clear()
    monkeypatch.setattr(encoding_cache.multihost, "barrier", other_host)
    found = run(0, tmp_path / "shared")
    every = [*CONDITIONS, *LATENTS, *TEXTS]
    assert parts == {0: every[::2], 1: every[1::2]}
    assert_same(found, whole)


def test_a_damaged_file_is_named(sd, encoder, made, tmp_path):
    pictures, _, _ = pictures_of()
    encode_once(tmp_path, sd, pictures, encoder=encoder)
    (file,) = (tmp_path / "encoded").glob("conditions-*/00000000.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"00000000\.safetensors: "):
        encode_once(tmp_path, sd, pictures, encoder=encoder)
