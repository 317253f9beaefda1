"""Concepts from a TFDS dataset on disk: pictures grouped by a field, e.g. by identity or label."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures, size_buckets
from hyperlora_jax.pictures.size_buckets import Size
from hyperlora_jax.pictures.subjects import Subject

SPLIT = "train"
CONCEPT_FIELDS = ("concept", "identity", "label", "class", "id")
CAPTION_FIELDS = ("caption", "text", "prompt")


def read_tfds_concepts(path: str | Path, buckets: Sequence[Size]) -> list[Subject]:
    """One subject per value of the concept field (the first of `CONCEPT_FIELDS` that the dataset
    has), its pictures cut to the bucket nearest to their median shape; captions are the first of
    `CAPTION_FIELDS`, or empty.

    Args:
        path: a dataset folder, read by `tfds.builder_from_directory`; random access is not needed
            to be cheap, every picture of the split is read once, with several buckets twice.

    Raises UserError naming the folder for no dataset, train split, such field, or pictures.
    """
    path = Path(path)
    builder = _open(path)
    if SPLIT not in builder.info.splits:
        raise UserError(
            f"{path}: has no split {SPLIT!r}, expected one of {', '.join(builder.info.splits)}"
        )
    fields = builder.info.features
    image = _image_field(path, fields)
    concept = next((name for name in CONCEPT_FIELDS if name in fields), None)
    caption = next((name for name in CAPTION_FIELDS if name in fields), None)
    if concept is None:
        expected, there = ", ".join(CONCEPT_FIELDS), ", ".join(sorted(fields))
        raise UserError(f"{path}: no concept field ({expected}) among {there}")
    names = getattr(fields[concept], "names", None)

    def rows() -> Iterator[tuple[str, np.ndarray, str]]:
        """(concept, picture, caption) of all pictures."""
        for row in _rows(path, builder):
            name = names[row[concept]] if names else _text(row[concept])
            yield name, row[image], _text(row[caption]) if caption else ""

    sizes: dict[str, Size] = {}
    if len(buckets) > 1:
        shapes: dict[str, list[Size]] = {}
        for name, picture, _ in rows():
            shapes.setdefault(name, []).append((picture.shape[0], picture.shape[1]))
        sizes = {name: size_buckets.nearest(own, buckets) for name, own in shapes.items()}
    groups: dict[str, list[tuple[bytes, str]]] = {}
    for name, picture, text in rows():
        cut = _fit(picture, sizes.get(name, buckets[0]), f"{path}, concept {name}")
        groups.setdefault(name, []).append((cut, text))
    if not groups:
        raise UserError(f"{path}: split {SPLIT!r} is empty, expected pictures")
    return [_subject(name, group) for name, group in sorted(groups.items())]


def _subject(name: str, group: Sequence[tuple[bytes, str]]) -> Subject:
    encoded = tuple(png for png, _ in group)
    captions = tuple(text for _, text in group)
    return Subject(name, name, references=encoded, targets=encoded, captions=captions)


def _open(path: Path) -> Any:
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    if not (path / "dataset_info.json").is_file():
        raise UserError(f"{path}: is no TFDS dataset, expected a folder with dataset_info.json")
    try:
        return tfds.builder_from_directory(str(path))
    except (OSError, ValueError, KeyError, AttributeError, ParseError) as error:
        raise UserError(f"{path}: the dataset cannot be opened ({error})") from None


def _rows(path: Path, builder: Any) -> Iterator[dict]:
    try:
        source = builder.as_data_source(split=SPLIT)
        for k in range(len(source)):
            yield source[k]
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{path}: split {SPLIT!r} cannot be read ({error}); expected an array_record dataset"
        ) from None


def _image_field(path: Path, fields: Any) -> str:
    import tensorflow_datasets as tfds

    for name, feature in sorted(fields.items()):
        if isinstance(feature, tfds.features.Image):
            return name
    raise UserError(f"{path}: has no picture field, its fields are {', '.join(sorted(fields))}")


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _fit(picture: np.ndarray, size: Size, name: str) -> bytes:
    """PNG bytes of the picture's centre at that size; grey pictures become RGB."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 3):
        raise UserError(f"{name}: picture of {picture.dtype} {picture.shape}, expected uint8 RGB")
    whole = pictures.encode_png(np.repeat(picture, 3 // picture.shape[-1], axis=-1))
    return pictures.encode_png(pictures.decode(whole, size, name))
