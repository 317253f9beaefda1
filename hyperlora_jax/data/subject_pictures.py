"""Subjects as plain pictures and captions: avatars, a folder per concept, or a dataset."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax import storage
from hyperlora_jax.array_types import UInt8
from hyperlora_jax.data import image_folder, pictures
from hyperlora_jax.data.lora_targets import open_lora_targets
from hyperlora_jax.data.size_buckets import Size, nearest, square
from hyperlora_jax.data.subjects import Subject
from hyperlora_jax.data.tfds_concepts import read_tfds_concepts
from hyperlora_jax.data.worlds import World, open_world
from hyperlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class SubjectPictures:
    """N subjects, at most v pictures each, all of one size.

    Attributes:
        ids: unique names; identities: who is shown (several subjects may show one identity).
        images: what a LoRA shall reproduce; a subject with fewer repeats its own in turn.
        captions: captions[n][v].
        counts: how many of a subject's pictures are its own, the first ones.
        references: PNG files of what a hypernetwork is given; empty = the subject's pictures.
        numbers: place of every subject in the whole source, which may have other sizes too.
        facts: what they were made from, JSON-able.
    """

    ids: tuple[str, ...]
    identities: tuple[str, ...]
    images: UInt8[np.ndarray, "n v h w 3"]
    captions: tuple[tuple[str, ...], ...]
    counts: tuple[int, ...]
    references: tuple[tuple[bytes, ...], ...]
    numbers: tuple[int, ...]
    facts: Mapping[str, Any]

    def targets_png(self, index: int) -> tuple[bytes, ...]:
        """A subject's own pictures as PNG files."""
        own = self.images[index, : self.counts[index]]
        return tuple(pictures.encode_png(picture) for picture in own)


def avatar_pictures(
    avatars: World,
    num_identities: int,
    num_views: int,
    *,
    split: str = "train",
    start: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> SubjectPictures:
    """Identities `start` .. `start + num_identities` of a split, each in views of its own.

    Raises:
        UserError: the split has fewer identities.
    """
    available = avatars.num_identities(split)
    if start + num_identities > available:
        raise UserError(
            f"data.num_identities: got {start + num_identities}, but {avatars.style} has "
            f"{available} {split} identities"
        )
    people = [avatars.identity(split, start + i) for i in range(num_identities)]
    views = [avatars.views("train", num_views, (start + i) * num_views) for i in range(len(people))]
    pairs = [(person, view) for person, own in zip(people, views, strict=True) for view in own]
    images = np.asarray(avatars.render_many(pairs, cache_dir, progress=progress))
    names = tuple(person.id for person in people)
    return SubjectPictures(
        ids=names,
        identities=names,
        images=images.reshape(num_identities, num_views, *images.shape[1:]),
        captions=tuple(tuple(avatars.caption(view) for view in own) for own in views),
        counts=(num_views,) * num_identities,
        references=((),) * num_identities,
        numbers=tuple(range(num_identities)),
        facts={
            "source": "avatars",
            "style": avatars.style,
            "size": avatars.size,
            "split_seed": avatars.split_seed,
            "split": split,
            "start": start,
            "num_identities": num_identities,
            "num_views": num_views,
            "licence": avatars.licence,
        },
    )


def _dense(
    subjects: Sequence[Subject], numbers: Sequence[int], facts: Mapping[str, Any]
) -> SubjectPictures:
    """Subjects of one size; those with fewer pictures than the fullest repeat theirs in turn."""
    most = max(len(subject.targets) for subject in subjects)
    images, captions = [], []
    for subject in subjects:
        turn = [k % len(subject.targets) for k in range(most)]
        decoded = [pictures.decode(png) for png in subject.targets]
        images.append(np.stack([decoded[k] for k in turn]))
        captions.append(tuple(subject.captions[k] for k in turn))
    return SubjectPictures(
        ids=tuple(subject.id for subject in subjects),
        identities=tuple(subject.identity for subject in subjects),
        images=np.stack(images),
        captions=tuple(captions),
        counts=tuple(len(subject.targets) for subject in subjects),
        references=tuple(
            () if subject.references == subject.targets else subject.references
            for subject in subjects
        ),
        numbers=tuple(numbers),
        facts=facts,
    )


def with_flips(given: SubjectPictures) -> SubjectPictures:
    """Every picture also mirrored left to right, under the same caption, just behind it: twice as
    many to reproduce. References stay as they are."""
    count, views, *shape = given.images.shape
    both = np.stack([given.images, given.images[:, :, :, ::-1]], axis=2)
    return dataclasses.replace(
        given,
        images=both.reshape(count, 2 * views, *shape),
        captions=tuple(tuple(text for text in own for _ in range(2)) for own in given.captions),
        counts=tuple(2 * own for own in given.counts),
        references=tuple(
            own or given.targets_png(index) for index, own in enumerate(given.references)
        ),
        facts={**given.facts, "flips": True},
    )


def with_prompt(given: SubjectPictures, prompt: str) -> SubjectPictures:
    """One prompt for all pictures instead of captions ("a photo of sks person")."""
    return dataclasses.replace(
        given,
        captions=tuple((prompt,) * len(own) for own in given.captions),
        facts={**given.facts, "prompt": prompt},
    )


def load_pictures(
    data: Any, count: int, size: int, cache_dir: str | Path | None = None
) -> SubjectPictures:
    """The training subjects of a config's `data` section, their pictures cut to squares.

    `source` is "avatars", a folder per concept, a TFDS dataset, a LoRA-target dataset (its training
    subjects), or several paths of the latter kinds with commas between them, whose
    concepts are joined. The first `count` subjects are taken, the others stay held out.

    Raises:
        UserError: fewer than `count` concepts; see `load_in_sizes`.
    """
    if data.source == "avatars":
        return _avatars(data, count, size, cache_dir)
    subjects = read_subjects(data.source, square(size), count, data.skip_damaged)[:count]
    (found,) = _by_size(subjects, data.source)
    return found


def load_in_sizes(
    data: Any, count: int, buckets: Sequence[Size], cache_dir: str | Path | None = None
) -> list[SubjectPictures]:
    """The first `count` subjects of a config's `data` section, those of one size together.

    Args:
        buckets: sizes to choose from; avatars are drawn at the first.

    Raises:
        UserError: no folder or dataset, fewer than `count` concepts, one without pictures, a
            picture that cannot be read, avatars of another size.
    """
    if data.source == "avatars":
        return [_avatars(data, count, buckets[0][0], cache_dir)]
    subjects = read_subjects(data.source, buckets, count, data.skip_damaged)[:count]
    return _by_size(subjects, data.source)


def _avatars(data: Any, count: int, size: int, cache_dir: str | Path | None) -> SubjectPictures:
    avatars = open_world(data.style, data.size, data.split_seed)
    if avatars.size != size:
        raise UserError(
            f"data.style {avatars.style} is drawn at {avatars.size} pixels, "
            f"but the base model works at {size}"
        )
    return avatar_pictures(avatars, count, data.num_views, cache_dir=cache_dir)


def read_subjects(
    source: str, buckets: Sequence[Size], count: int = 1, skip_damaged: bool = False
) -> list[Subject]:
    """Every subject of a folder or dataset, or of several, in the order of their names.

    Args:
        buckets: sizes to choose from.
        count: how many there must be at least.
        skip_damaged: of LoRA-target datasets, leave out what cannot be read.

    Raises:
        UserError: see `load_in_sizes`.
    """
    subjects: list[Subject] = []
    for given in split_paths(source):
        path = str(storage.fetched(given))
        if (Path(path) / "index.json").is_file():
            subjects += _dataset_subjects(path, buckets, skip_damaged)
        elif (Path(path) / "dataset_info.json").is_file():
            subjects += read_tfds_concepts(path, buckets)
        else:
            folders = image_folder.open_image_folder(path)
            subjects += [image_folder.read_concept(folder, buckets) for folder in folders]
    if count > len(subjects):
        raise UserError(f"{source}: has {len(subjects)} concepts, expected {count}")
    counts = collections.Counter(subject.id for subject in subjects)
    if twice := [name for name, number in counts.items() if number > 1]:
        raise UserError(f"{source}: {len(twice)} concepts are there twice, first {twice[0]!r}")
    return subjects


def split_paths(given: str) -> list[str]:
    """A path, or several with commas between them."""
    return [given] if Path(given).exists() else [part.strip() for part in given.split(",")]


def _dataset_subjects(path: str, buckets: Sequence[Size], skip_damaged: bool) -> list[Subject]:
    """The training subjects of a LoRA-target dataset with the pictures that it holds."""
    targets = open_lora_targets(path, skip_damaged=skip_damaged)
    subjects = []
    for k in targets.split_indices("train"):
        subject = targets[int(k)]
        if not subject.targets or not subject.references:
            raise UserError(f"{path}: subject {subject.id} has no pictures, expected some")
        shapes = [pictures.decode(png, name=subject.id).shape[:2] for png in subject.targets]
        size = nearest(shapes, buckets)
        references, cut = (
            tuple(pictures.encode_png(pictures.decode(png, size, subject.id)) for png in given)
            for given in (subject.references, subject.targets)
        )
        subjects.append(dataclasses.replace(subject, references=references, targets=cut))
    if not subjects:
        raise UserError(f"{path}: has no subjects in its train split, expected some")
    return subjects


def _by_size(subjects: Sequence[Subject], source: str) -> list[SubjectPictures]:
    groups: dict[Size, list[int]] = {}
    for number, subject in enumerate(subjects):
        height, width, _ = pictures.decode(subject.targets[0]).shape
        groups.setdefault((height, width), []).append(number)
    facts = {"source": str(source), "num_identities": len(subjects)}
    return [
        _dense([subjects[k] for k in numbers], numbers, {**facts, "size": list(size)})
        for size, numbers in sorted(groups.items())
    ]
