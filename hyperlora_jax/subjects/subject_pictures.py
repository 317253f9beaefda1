"""Subjects as plain pictures and captions: avatars, a folder per concept, or a dataset."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import lazy_pictures, pictures
from hyperlora_jax.pictures.concepts import Concept
from hyperlora_jax.pictures.lazy_pictures import LazyPictures, LazySequence
from hyperlora_jax.pictures.picture_hashes import LENGTH
from hyperlora_jax.pictures.size_buckets import Size, square
from hyperlora_jax.subjects.concept_sources import identified, list_concepts
from hyperlora_jax.worlds.by_style import World, open_world


@dataclasses.dataclass(frozen=True, eq=False)
class SubjectPictures:
    """N subjects, each with its own number of pictures to reproduce, all of one size.

    Attributes:
        ids: unique names; identities: who is shown (several subjects may show one identity).
        images: what a LoRA shall reproduce. Those of folders and datasets are read when asked for.
        captions: captions[n][v].
        references: PNG files of what a hypernetwork is given; empty = the subject's pictures.
        seen_at: the same pictures as a condition encoder of that size (height, width) sees them,
            cut from what lies on the disk and not from the targets' size.
        numbers: place of every subject in the whole source, which may have other sizes too.
        facts: what they were made from, JSON-able.
        marks: one per subject, of its pictures and captions by their content; () where the facts
            say it all, as of drawn worlds.
    """

    ids: tuple[str, ...]
    identities: tuple[str, ...]
    images: LazyPictures
    captions: tuple[tuple[str, ...], ...]
    references: Sequence[tuple[bytes, ...]]
    seen_at: Callable[[Size], LazyPictures]
    numbers: tuple[int, ...]
    facts: Json
    marks: tuple[str, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """How many pictures every subject has to reproduce."""
        return self.images.counts

    @property
    def size(self) -> Size:
        """(height, width) of the pictures to reproduce."""
        return self.images.size

    def targets_png(self, index: int) -> tuple[bytes, ...]:
        """A subject's pictures to reproduce as PNG files."""
        return tuple(pictures.encode_png(picture) for picture in self.images[index])


def avatar_pictures(
    avatars: World, num_identities: int, num_views: int, cache_dir: str | Path | None = None
) -> SubjectPictures:
    """The first training identities of a world, each in views of its own.

    Raises:
        UserError: there are fewer.
    """
    people = avatars.training_people(num_identities, num_views)
    pairs = [(person, view) for person, own in people for view in own]
    images = np.asarray(avatars.render_many(pairs, cache_dir))
    names = tuple(person.id for person, _ in people)
    drawn = lazy_pictures.of_array(images.reshape(num_identities, num_views, *images.shape[1:]))
    return SubjectPictures(
        ids=names,
        identities=names,
        images=drawn,
        captions=tuple(tuple(avatars.caption(view) for view in own) for _, own in people),
        references=((),) * num_identities,
        seen_at=lambda size: _resampled(drawn, size),
        numbers=tuple(range(num_identities)),
        facts={
            "source": "avatars",
            "style": avatars.style,
            "size": avatars.size,
            "split_seed": avatars.split_seed,
            "split": "train",
            "start": 0,
            "num_identities": num_identities,
            "num_views": num_views,
            "licence": avatars.licence,
        },
    )


def _resampled(images: LazyPictures, size: Size) -> LazyPictures:
    """Drawn pictures at a size, as a file of them would be read."""
    if size == images.size:
        return images

    def resampled(own: np.ndarray) -> list[np.ndarray]:
        return [pictures.decode(pictures.encode_png(picture), size) for picture in own]

    return images.map(resampled, "seen", size=size)


def _of_one_size(
    members: Sequence[Concept], numbers: Sequence[int], facts: Json
) -> SubjectPictures:
    """Concepts of one size."""

    def references(k: int) -> tuple[bytes, ...]:
        return members[k].load().references if members[k].other_references else ()

    def seen_at(size: Size) -> LazyPictures:
        loads = [lambda concept=concept: concept.references_at(size) for concept in members]
        return LazyPictures(loads, [c.num_references for c in members], size, mark)

    marks = "\n".join(concept.mark for concept in members)
    mark = hashlib.sha256(marks.encode()).hexdigest()
    return SubjectPictures(
        ids=tuple(concept.id for concept in members),
        identities=tuple(concept.identity for concept in members),
        images=LazyPictures(
            [concept.pixels for concept in members],
            [len(concept.captions) for concept in members],
            members[0].size,
            mark,
        ),
        captions=tuple(concept.captions for concept in members),
        references=LazySequence(len(members), references),
        seen_at=seen_at,
        numbers=tuple(numbers),
        facts=facts,
        marks=tuple(concept.mark for concept in members),
    )


def with_flips(given: SubjectPictures) -> SubjectPictures:
    """Every picture also mirrored left to right, under the same caption, just behind it: twice as
    many to reproduce. References stay as they are."""

    def flipped(own: np.ndarray) -> np.ndarray:
        both = np.stack([own, own[:, :, ::-1]], axis=1)
        return both.reshape(2 * len(own), *own.shape[1:])

    return dataclasses.replace(
        given,
        images=given.images.map(flipped, "flips", times=2),
        captions=tuple(tuple(text for text in own for _ in range(2)) for own in given.captions),
        references=LazySequence(
            len(given.ids), lambda k: given.references[k] or given.targets_png(k)
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
    data: ConfigDict, count: int, size: int, cache_dir: str | Path | None = None
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
    listed = list_concepts(data.source, square(size), count, data.skip_damaged)[:count]
    (pictures,) = _by_size(identified(listed), data.source)
    return pictures


def load_in_sizes(
    data: ConfigDict, count: int, buckets: Sequence[Size], cache_dir: str | Path | None = None
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
    listed = list_concepts(data.source, buckets, count, data.skip_damaged)[:count]
    return _by_size(identified(listed), data.source)


def _avatars(
    data: ConfigDict, count: int, size: int, cache_dir: str | Path | None
) -> SubjectPictures:
    avatars = open_world(data.style, data.size, data.split_seed)
    if avatars.size != size:
        raise UserError(
            f"data.style {avatars.style} is drawn at {avatars.size} pixels, "
            f"but the base model works at {size}"
        )
    return avatar_pictures(avatars, count, data.num_views, cache_dir)


def _by_size(members: Sequence[Concept], source: str) -> list[SubjectPictures]:
    groups: dict[Size, list[int]] = {}
    for number, concept in enumerate(members):
        groups.setdefault(concept.size, []).append(number)
    marks = "\n".join(concept.mark for concept in members)
    facts = {
        "source": str(source),
        "num_identities": len(members),
        "pictures": hashlib.sha256(marks.encode()).hexdigest()[:LENGTH],
    }
    return [
        _of_one_size([members[k] for k in numbers], numbers, {**facts, "size": list(size)})
        for size, numbers in sorted(groups.items())
    ]
