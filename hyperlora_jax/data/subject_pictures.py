"""Subjects as plain pictures and captions: avatars, a folder per concept, or a TFDS dataset."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.data import image_folder, pictures
from hyperlora_jax.data.subjects import Subject
from hyperlora_jax.data.tfds_concepts import read_tfds_concepts
from hyperlora_jax.data.worlds import World, open_world
from hyperlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class SubjectPictures:
    """N subjects, v pictures each.

    Attributes:
        ids: unique names; identities: who is shown (several subjects may show one identity).
        images: uint8 [n, v, h, w, 3]; captions: captions[n][v].
        facts: what they were made from, JSON-able.
    """

    ids: tuple[str, ...]
    identities: tuple[str, ...]
    images: UInt8[np.ndarray, "n v h w 3"]
    captions: tuple[tuple[str, ...], ...]
    facts: Mapping[str, Any]

    def png(self, index: int) -> tuple[bytes, ...]:
        """Pictures of one subject as PNG files."""
        return tuple(pictures.encode_png(picture) for picture in self.images[index])


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


def read_subjects(path: str | Path, size: int, default_caption: str = "") -> list[Subject]:
    """One subject per sub-folder (`image_folder.read_concept`), or per concept of the train split
    of a TFDS dataset (`read_tfds_concepts`), in the order of their names.

    Raises:
        UserError: no folder, no pictures in one, a picture that cannot be read; no field of the
            dataset that tells concepts apart.
    """
    if (Path(path) / "dataset_info.json").is_file():
        return read_tfds_concepts(path, size, default_caption=default_caption)
    folders = image_folder.open_image_folder(path)
    return [image_folder.read_concept(folder, size, default_caption) for folder in folders]


def _dense(subjects: Sequence[Subject], facts: Mapping[str, Any]) -> SubjectPictures:
    """Subjects with fewer pictures than the fullest repeat theirs in turn."""
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
        facts={**facts, "num_identities": len(subjects)},
    )


def with_flips(given: SubjectPictures) -> SubjectPictures:
    """Every picture also mirrored left to right, under the same caption: twice as many views."""
    return dataclasses.replace(
        given,
        images=np.concatenate([given.images, given.images[:, :, :, ::-1]], axis=1),
        captions=tuple((*own, *own) for own in given.captions),
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
    """The training subjects of a config's `data` section.

    `source` is "avatars", a folder per concept, or the folder of a TFDS dataset; its first `count`
    subjects are taken, the others stay held out.
    """
    if data.source == "avatars":
        avatars = open_world(data.style, data.size, data.split_seed)
        if avatars.size != size:
            raise UserError(
                f"data.style {avatars.style} is drawn at {avatars.size} pixels, "
                f"but the base model works at {size}"
            )
        return avatar_pictures(avatars, count, data.num_views, cache_dir=cache_dir)
    found = read_subjects(data.source, size)
    if count > len(found):
        raise UserError(f"{data.source}: has {len(found)} concepts, expected {count}")
    return _dense(found[:count], {"source": str(data.source), "size": size})
