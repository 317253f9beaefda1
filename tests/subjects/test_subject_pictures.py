import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.pictures import pictures
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.subjects.subject_pictures import (
    load_in_sizes,
    load_pictures,
    with_flips,
    with_prompt,
)
from hyperlora_jax.targets.lora_targets_writer import write_lora_targets
from tests.pictures.test_tfds_concepts import IMAGE, write


def section(source):
    return ConfigDict({"source": str(source), "size": 4, "skip_damaged": False})


@pytest.fixture(name="folder")
def _folder(tmp_path):
    random = np.random.default_rng(0)
    for name, views in (("anna", 3), ("bert", 2)):
        (tmp_path / name).mkdir()
        for k in range(views):
            pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    return tmp_path


def test_folders_and_datasets_give_the_same_arrays(folder, tmp_path):
    found = load_pictures(section(folder), 2, 4)
    assert found.ids == ("anna", "bert") and found.counts == (3, 2) and found.size == (4, 4)
    rows = [
        {"image": str(file), "concept": name}
        for name in ("bert", "anna")
        for file in sorted((folder / name).glob("*.png"))
    ]
    dataset = write(tmp_path / "dataset", rows, image=IMAGE, concept=tfds.features.Text())
    same = load_pictures(section(dataset), 2, 4)
    assert same.ids == found.ids
    assert same.counts == found.counts and same.seen_at((4, 4)).counts == (3, 2)
    for k in range(2):
        np.testing.assert_array_equal(same.images[k], found.images[k])
    with pytest.raises(UserError, match="has 2 concepts, expected 3"):
        load_pictures(section(dataset), 3, 4)


def test_flips_and_prompts(folder):
    plain = load_pictures(section(folder), 2, 4)
    both = with_prompt(with_flips(plain), "a photo of sks person")
    assert plain.counts == (3, 2) and both.counts == (6, 4)
    for k in range(2):
        np.testing.assert_array_equal(both.images[k][::2], plain.images[k])
        np.testing.assert_array_equal(both.images[k][1::2, :, ::-1], plain.images[k])
    assert both.captions == (("a photo of sks person",) * 6, ("a photo of sks person",) * 4)
    assert both.seen_at((4, 4)).counts == (3, 2), "references stay as they are"
    assert len(both.targets_png(1)) == 4 and both.references[1] == plain.targets_png(1)
    assert both.facts["flips"] and both.facts["prompt"] == "a photo of sks person"


def test_concepts_of_one_size_come_together(folder, tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    (tmp_path / "carl").mkdir()
    Image.fromarray(wide).save(tmp_path / "carl" / "0.png")
    row = '{"file_name": "0.png", "role": "reference"}'
    (tmp_path / "anna" / "metadata.jsonl").write_text(row)
    buckets = ((4, 4), (2, 4))
    flat, even = load_in_sizes(section(folder), 3, buckets)
    assert (flat.ids, flat.numbers, flat.counts, flat.size) == (("carl",), (2,), (1,), (2, 4))
    assert (even.ids, even.numbers, even.counts) == (("anna", "bert"), (0, 1), (2, 2))
    assert [len(own) for own in even.references] == [3, 0], "anna has one more reference"
    seen = even.seen_at((6, 6))
    assert seen.counts == (3, 2) and seen[0].shape == (3, 6, 6, 3)
    original = pictures.load_image(tmp_path / "anna" / "0.png", 6)
    np.testing.assert_array_equal(seen[0][0], original)
    assert flat.facts["size"] == [2, 4] and flat.facts["num_identities"] == 3
    (first,) = load_in_sizes(section(folder), 1, buckets)
    assert first.ids == ("anna",)


def test_a_dataset_of_loras_is_a_source_too(folder, tmp_path):
    plain = load_pictures(section(folder), 2, 4)
    for name, k in (("one", 0), ("two", 1)):
        png = plain.targets_png(k)
        subject = Subject(plain.ids[k], f"{k}", png[:1], png, plain.captions[k])
        other = dataclasses.replace(subject, id=f"{name} held out", identity="h", split="test")
        write_lora_targets(
            tmp_path / name, [dataclasses.replace(subject, split="train"), other], LoraSpec(()), ""
        )
    both = section(f"{tmp_path / 'one'},{tmp_path / 'two'}")
    found = load_pictures(both, 2, 4)
    assert (found.ids, found.counts) == (plain.ids, plain.counts)
    for k in range(2):
        np.testing.assert_array_equal(found.images[k], plain.images[k])
        np.testing.assert_array_equal(found.seen_at((4, 4))[k], plain.images[k][:1])
    assert tuple(found.references) == tuple(plain.targets_png(k)[:1] for k in range(2))
    with pytest.raises(UserError, match="1 concepts are there twice, first 'anna'"):
        load_pictures(section(f"{tmp_path / 'one'},{folder}"), 2, 4)
    bare = Subject("a", "a", split="train")
    write_lora_targets(tmp_path / "bare", [bare], LoraSpec(()), "")
    with pytest.raises(UserError, match="bare: subject a has no pictures"):
        load_pictures(section(tmp_path / "bare"), 1, 4)


def test_whole_factors_are_block_means():
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    means = pixels[:, 4:12].reshape(4, 2, 4, 2, 3).mean((1, 3))
    found = pictures.decode(pictures.encode_png(pixels), 4).astype(float)
    assert np.abs(found - means).max() <= 1  # two passes, each rounded
    other = pictures.decode(pictures.encode_png(pixels), 3)
    assert other.shape == (3, 3, 3)
