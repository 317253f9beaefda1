"""The concepts of a folder, of a LoRA-target dataset, of a TFDS dataset, or of several of them."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import concepts, image_folder, pictures
from hyperlora_jax.pictures.concepts import Concept
from hyperlora_jax.pictures.picture_hashes import LENGTH, content_hashes
from hyperlora_jax.pictures.size_buckets import Size, nearest
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.pictures.tfds_concepts import read_tfds_concepts
from hyperlora_jax.targets.lora_targets import open_lora_targets


def list_concepts(
    source: str, buckets: Sequence[Size], count: int = 1, skip_damaged: bool = False
) -> list[Concept]:
    """Every concept of a folder or dataset, or of several, in the order of their names.

    Args:
        buckets: sizes to choose from.
        count: how many there must be at least.
        skip_damaged: of LoRA-target datasets, leave out what cannot be read.

    Raises:
        UserError: no folder or dataset, fewer than `count` concepts, one that is there twice or
            has no pictures.
    """
    concepts: list[Concept] = []
    for given in split_paths(source):
        path = str(storage.fetched(given))
        if _holds(path, "index.json", "metadata.json"):
            concepts += _dataset_concepts(path, buckets, skip_damaged)
        elif _holds(path, "dataset_info.json", "features.json"):
            concepts += _tfds_concepts(path, buckets)
        else:
            folders = image_folder.open_image_folder(path)
            concepts += [image_folder.open_concept(folder, buckets) for folder in folders]
    if count > len(concepts):
        raise UserError(f"{source}: has {len(concepts)} concepts, expected {count}")
    counts = collections.Counter(concept.id for concept in concepts)
    if twice := [name for name, number in counts.items() if number > 1]:
        raise UserError(f"{source}: {len(twice)} concepts are there twice, first {twice[0]!r}")
    return concepts


def identified(listed: Sequence[Concept]) -> list[Concept]:
    """The concepts with marks that tell them by their content alone: names, bytes and roles of the
    pictures, and captions; where they lie and how old they are does not matter.

    Raises:
        UserError: a file cannot be read.
    """
    by_root: dict[str, list[str]] = {}
    for concept in listed:
        for file, _ in concept.files:
            by_root.setdefault(os.path.dirname(os.path.dirname(file)), []).append(file)  # noqa: PTH120
    hashes = {
        file: value
        for root, files in by_root.items()
        for file, value in zip(files, content_hashes(Path(root), files), strict=True)
    }

    def mark(concept: Concept) -> str:
        rows = [(file.rpartition(os.sep)[2], role, hashes[file]) for file, role in concept.files]
        text = json.dumps([concept.id, rows or concept.mark, concept.captions])
        return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]

    return [dataclasses.replace(concept, mark=mark(concept)) for concept in listed]


def _holds(folder: str, *names: str) -> bool:
    """Whether a folder is a dataset: a single such file also lies beside folders of pictures."""
    return all((Path(folder) / name).is_file() for name in names)


def split_paths(given: str) -> list[str]:
    """A path, or several with commas between them."""
    return [given] if Path(given).exists() else [part.strip() for part in given.split(",")]


def _dataset_concepts(path: str, buckets: Sequence[Size], skip_damaged: bool) -> list[Concept]:
    """The training subjects of a LoRA-target dataset with the pictures that it holds."""
    targets = open_lora_targets(path, skip_damaged=skip_damaged)

    def size_of(subject: Subject) -> Size:
        if len(buckets) == 1:
            return buckets[0]
        shapes = [pictures.decode(png, name=subject.id).shape[:2] for png in subject.targets]
        return nearest(shapes, buckets)

    def load(k: int, size: Size) -> Subject:
        subject = targets[k]
        references, cut = (
            tuple(pictures.encode_png(pictures.decode(png, size, subject.id)) for png in given)
            for given in (subject.references, subject.targets)
        )
        return dataclasses.replace(subject, references=references, targets=cut)

    listed = []
    for k in map(int, targets.split_indices("train")):
        subject = targets[k]
        if not subject.targets or not subject.references:
            raise UserError(f"{path}: subject {subject.id} has no pictures, expected some")
        size = size_of(subject)
        listed.append(
            concepts.of_subject(
                subject,
                size,
                functools.partial(load, k, size),
                lambda k=k: targets[k].references,
            )
        )
    if not listed:
        raise UserError(f"{path}: has no subjects in its train split, expected some")
    return listed


def _tfds_concepts(path: str, buckets: Sequence[Size]) -> list[Concept]:
    """Concepts of a TFDS dataset, whose pictures lie in no order: they are kept as PNG files."""

    def of(subject: Subject) -> Concept:
        height, width, _ = pictures.decode(subject.targets[0], name=subject.id).shape
        return concepts.of_subject(
            subject, (height, width), lambda: subject, lambda: subject.references
        )

    return [of(subject) for subject in read_tfds_concepts(path, buckets)]
