"""What a folder or a dataset has of one concept, before any picture is read."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.data import pictures
from hyperlora_jax.data.size_buckets import Size
from hyperlora_jax.data.subjects import Subject


@dataclasses.dataclass(frozen=True)
class Concept:
    """A subject whose pictures are read when they are asked for.

    Attributes:
        id, identity: see `Subject`.
        captions: one per picture that a LoRA shall reproduce.
        size: (height, width) that its pictures are cut to.
        mark: tells these pictures from others, without reading them.
        load: gives the subject, its pictures as PNG files.
        pixels: gives its pictures to reproduce, decoded.
        other_references: whether what a hypernetwork is given are other pictures than these.
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
    other_references: bool
    files: tuple[tuple[Path, str], ...] = ()


def of_subject(subject: Subject, size: Size, load: Callable[[], Subject]) -> Concept:
    """The concept of a subject that was read already; `load` gives it with pictures of `size`."""
    return Concept(
        subject.id,
        subject.identity,
        subject.captions,
        size,
        hashlib.sha256(b"".join(subject.targets)).hexdigest(),
        load,
        lambda: [pictures.decode(png) for png in load().targets],
        subject.references != subject.targets,
    )
