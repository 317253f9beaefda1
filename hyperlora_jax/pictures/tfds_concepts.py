"""Concepts from a TFDS dataset on disk: pictures grouped by a field, e.g. by identity or label."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures, size_buckets
from hyperlora_jax.pictures.size_buckets import Size
from hyperlora_jax.pictures.subjects import Subject

CONCEPT_FIELDS = ("concept", "identity", "label", "class", "id")
CAPTION_FIELDS = ("caption", "text", "prompt")


def read_tfds_concepts(
    path: str | Path,
    buckets: Sequence[Size],
    split: str = "train",
    concept_field: str | None = None,
    caption_field: str | None = None,
    default_caption: str = "",
    max_pictures: int | None = None,
) -> list[Subject]:
    """One subject per value of the concept field, its pictures cut to the bucket nearest to their
    median shape.

    Args:
        path: a dataset folder, read by `tfds.builder_from_directory`; random access is not needed
            to be cheap, every picture of the split is read once, with several buckets twice.
        concept_field: None takes the first of `CONCEPT_FIELDS` that the dataset has.
        caption_field: None takes the first of `CAPTION_FIELDS`, or none.
        max_pictures: per concept, the first ones are kept.

    Raises UserError naming the folder for no dataset, no such split or field, or no pictures.
    """
    path = Path(path)
    builder = _open(path)
    if split not in builder.info.splits:
        raise UserError(
            f"{path}: has no split {split!r}, expected one of {', '.join(builder.info.splits)}"
        )
    fields = builder.info.features
    image = _image_field(path, fields)
    concept = _field(path, fields, concept_field, CONCEPT_FIELDS, "concept")
    caption = _field(path, fields, caption_field, CAPTION_FIELDS, None)
    names = getattr(fields[concept], "names", None)

    def rows() -> Iterator[tuple[str, np.ndarray, str]]:
        """(concept, picture, caption) of the pictures that are kept."""
        counts: dict[str, int] = {}
        for row in _rows(path, builder, split):
            name = names[row[concept]] if names else _text(row[concept])
            counts[name] = counts.get(name, 0) + 1
            if max_pictures is None or counts[name] <= max_pictures:
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
        groups.setdefault(name, []).append((cut, text or default_caption))
    if not groups:
        raise UserError(f"{path}: split {split!r} is empty, expected pictures")
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


def _rows(path: Path, builder: Any, split: str) -> Iterator[dict]:
    try:
        source = builder.as_data_source(split=split)
        for k in range(len(source)):
            yield source[k]
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{path}: split {split!r} cannot be read ({error}); expected an array_record dataset"
        ) from None


def _image_field(path: Path, fields: Any) -> str:
    import tensorflow_datasets as tfds

    for name, feature in sorted(fields.items()):
        if isinstance(feature, tfds.features.Image):
            return name
    raise UserError(f"{path}: has no picture field, its fields are {', '.join(sorted(fields))}")


def _field(
    path: Path,
    fields: Any,
    given: str | None,
    usual: Sequence[str],
    needed: str | None,
) -> str:
    if given is not None:
        if given not in fields:
            raise UserError(
                f"{path}: has no field {given!r}, its fields are {', '.join(sorted(fields))}"
            )
        return given
    for name in usual:
        if name in fields:
            return name
    if needed is None:
        return ""
    found = ", ".join(sorted(fields))
    raise UserError(f"{path}: no {needed} field ({', '.join(usual)}) among {found}; name one")


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _fit(picture: np.ndarray, size: Size, name: str) -> bytes:
    """PNG bytes of the picture's centre at that size; grey pictures become RGB."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 3):
        raise UserError(f"{name}: picture of {picture.dtype} {picture.shape}, expected uint8 RGB")
    whole = pictures.encode_png(np.repeat(picture, 3 // picture.shape[-1], axis=-1))
    return pictures.encode_png(pictures.decode(whole, size, name))
