import io
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures
from hyperlora_jax.pictures.size_buckets import of_one_area, square
from hyperlora_jax.pictures.tfds_concepts import read_tfds_concepts


def write(path, rows, **fields):
    path.mkdir()
    features = tfds.features.FeaturesDict(fields)
    name = path / "toys-train.array_record-00000-of-00001"
    file = array_record_module.ArrayRecordWriter(os.fspath(name), "group_size:1")
    for row in rows:
        file.write(features.serialize_example(row))
    file.close()
    info = tfds.core.SplitInfo(name="train", shard_lengths=[len(rows)], num_bytes=1)
    tfds.folder_dataset.write_metadata(
        data_dir=str(path), features=features, split_infos=[info], check_data=False
    )
    return path


IMAGE = tfds.features.Image(shape=(None, None, 3), encoding_format="png")


def picture(value):
    return io.BytesIO(pictures.encode_png(np.full((6, 9, 3), value, np.uint8)))


def test_pictures_are_grouped_by_label(tmp_path):
    rows = [{"image": picture(40 * k), "label": k % 2, "caption": f"toy {k}"} for k in range(5)]
    label = tfds.features.ClassLabel(names=["bear", "car"])
    path = write(tmp_path / "d", rows, image=IMAGE, label=label, caption=tfds.features.Text())
    bear, car = read_tfds_concepts(path, square(4))
    assert (bear.id, car.id) == ("bear", "car")
    assert bear.captions == ("toy 0", "toy 2", "toy 4") and len(car.references) == 2
    assert (pictures.decode(bear.targets[2]) == 160).all()
    assert pictures.decode(car.references[0]).shape == (4, 4, 3)


def test_every_concept_has_the_bucket_of_its_pictures(tmp_path):
    shapes = {"tall": (40, 20), "wide": (20, 40), "even": (30, 28)}
    rows = [
        {"image": io.BytesIO(pictures.encode_png(np.full((*shape, 3), 9, np.uint8))), "label": name}
        for _ in range(2)
        for name, shape in shapes.items()
    ]
    path = write(tmp_path / "d", rows, image=IMAGE, label=tfds.features.Text())
    found = read_tfds_concepts(path, of_one_area(16, 4))
    sizes = {s.id: [pictures.decode(png).shape[:2] for png in s.targets] for s in found}
    assert sizes == {"even": [(16, 16)] * 2, "tall": [(20, 12)] * 2, "wide": [(12, 20)] * 2}


def test_text_concepts_without_captions(tmp_path):
    rows = [{"photo": picture(k), "id": who} for k, who in enumerate(["anna", "bert", "anna"])]
    path = write(tmp_path / "d", rows, photo=IMAGE, id=tfds.features.Text())
    anna, bert = read_tfds_concepts(path, square(4))
    assert anna.captions == ("",) * 2 and bert.identity == "bert"
    who = write(tmp_path / "w", [{"photo": picture(0)}], photo=IMAGE)
    with pytest.raises(UserError, match=r"no concept field .* among photo"):
        read_tfds_concepts(who, square(4))


def test_wrong_datasets_are_named(tmp_path):
    with pytest.raises(UserError, match="is no TFDS dataset"):
        read_tfds_concepts(tmp_path, square(4))
    path = write(tmp_path / "d", [{"id": "a"}], id=tfds.features.Text())
    with pytest.raises(UserError, match="has no picture field, its fields are id"):
        read_tfds_concepts(path, square(4))
    (tmp_path / "e").mkdir()
    (tmp_path / "e/dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="the dataset cannot be opened"):
        read_tfds_concepts(tmp_path / "e", square(4))
