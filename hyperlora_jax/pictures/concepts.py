"""What a folder or a dataset has of one concept, before any picture is read."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.pictures import pictures
from hyperlora_jax.pictures.size_buckets import Size
from hyperlora_jax.pictures.subjects import Subject


@dataclasses.dataclass(frozen=True)
class Concept:
    """A subject whose pictures are read when they are asked for.

    Attributes:
        id, identity: see `Subject`.
        captions: one per picture that a LoRA shall reproduce.
        size: (height, width) that its pictures are cut to.
        mark: tells these pictures and their roles from others; "" of files, which
            `concept_sources.identified` tells by their content.
        load: gives the subject, its pictures as PNG files.
        pixels: gives its pictures to reproduce, decoded.
        num_references: how many pictures a hypernetwork is given.
        references_at: gives those, decoded at a size (height, width).
        other_references: whether they are other pictures than those to reproduce.
        files: where its pictures lie and what they are for, (path, role); () where they are no
            files of their own.
    """

    id: str
    identity: str
    captions: tuple[str, ...]
    size: Size
    mark: str
    load: Callable[[], Subject]
    pixels: Callable[[], Sequence[UInt8[np.ndarray, "h w 3"]]]
    num_references: int
    references_at: Callable[[Size], Sequence[UInt8[np.ndarray, "h w 3"]]]
    other_references: bool
    files: tuple[tuple[str, str], ...] = ()


def of_subject(
    subject: Subject,
    size: Size,
    load: Callable[[], Subject],
    references: Callable[[], Sequence[bytes]],
) -> Concept:
    """The concept of a subject that was read already; `load` gives it with pictures of `size`,
    `references` gives what a hypernetwork is given as it was kept."""
    name = subject.id  # the subject itself, with its pictures, is not to be kept
    return Concept(
        name,
        subject.identity,
        subject.captions,
        size,
        hashlib.sha256(b"".join((*subject.targets, *subject.references))).hexdigest(),
        load,
        lambda: [pictures.decode(png) for png in load().targets],
        len(subject.references),
        lambda seen: [pictures.decode(png, seen, name) for png in references()],
        subject.references != subject.targets,
    )
