"""What worlds of rendered things have in common: views made of named parts, and pictures of them.

A view is a class for every part, its caption names them all. Which combinations of some parts are
held out is fixed by the split seed.
"""

import abc
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax.array_types import JsonDict, UInt8
from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds import avatar_render

SPLITS = ("train", "validation", "test")
HELD_OUT_VIEWS = 0.10  # of the reserved combinations


@dataclasses.dataclass(frozen=True)
class NamedView:
    """One way to show something: a class for every view part."""

    classes: tuple[str, ...]

    @property
    def id(self) -> str:
        """Stable name, e.g. "smiling.left.soft.blue"."""
        return ".".join(self.classes)


class NamedViews(abc.ABC):
    """Views and pictures; a world adds identities, `caption` and `options`.

    Attributes:
        style: name of the world.
        view_parts: class names of every part.
        reserved: the parts whose combinations are held out.
        size: picture side in pixels. split_seed: fixes what is held out.
    """

    style: str
    view_parts: Mapping[str, list[str]]
    reserved: tuple[str, ...]
    size: int
    split_seed: int

    @property
    def part_names(self) -> dict[str, list[str]]:
        """Every view part and its class names."""
        return dict(self.view_parts)

    def view(self, split: str, index: int) -> NamedView:
        """The index-th random view; training views never show a reserved combination, evaluation
        views always do."""
        checked_split(split)
        for attempt in itertools.count():
            drawn = [
                names[int(self.uniform("view", split, index, attempt, part) * len(names))]
                for part, names in self.view_parts.items()
            ]
            view = NamedView(tuple(drawn))
            if self.is_reserved(view) == (split != "train"):
                return view
        raise AssertionError("unreachable")

    def views(self, split: str, count: int, start: int = 0) -> list[NamedView]:
        """`count` views of a split from index `start`."""
        return [self.view(split, start + k) for k in range(count)]

    def view_of(self, classes: Sequence[str]) -> NamedView:
        """The view of a class for every view part."""
        return NamedView(tuple(classes))

    def is_reserved(self, view: NamedView) -> bool:
        """Whether the view's combination is kept for evaluation."""
        return self.uniform("view reserve", *self.combination(view)) < HELD_OUT_VIEWS

    def combination(self, view: NamedView) -> tuple[str, ...]:
        """The view's classes of the reserved parts."""
        named = dict(zip(self.view_parts, view.classes, strict=True))
        return tuple(named[part] for part in self.reserved)

    def caption_parts(self, view: NamedView) -> dict[str, int]:
        """Class index of every view part."""
        return class_indices(self.view_parts, view.classes)

    @abc.abstractmethod
    def num_identities(self, split: str) -> int:
        """How many different identities a split has; `identity` repeats after that many."""

    @abc.abstractmethod
    def identity(self, split: str, index: int) -> Any:
        """The index-th identity of a split."""

    @abc.abstractmethod
    def caption(self, view: NamedView) -> str:
        """The view's parts in words; the identity is not in it."""

    @abc.abstractmethod
    def options(self, identity: Any, view: NamedView) -> JsonDict:
        """What the world's `draw` is given, JSON-able."""

    def training_people(self, count: int, num_views: int) -> list[tuple[Any, list[NamedView]]]:
        """The first `count` training identities, each with training views of its own.

        Raises:
            UserError: there are fewer.
        """
        available = self.num_identities("train")
        if count > available:
            raise UserError(
                f"data.num_identities: got {count}, but {self.style} has {available} train "
                "identities"
            )
        return [
            (self.identity("train", k), self.views("train", num_views, k * num_views))
            for k in range(count)
        ]

    def render(self, identity: Any, view: NamedView) -> UInt8[np.ndarray, "h w 3"]:
        """The exact picture of an identity in a view."""
        return avatar_render.draw(self.options(identity, view), self.style, self.size)

    def render_many(
        self,
        pairs: Sequence[tuple[Any, NamedView]],
        cache_dir: str | Path | None = None,
        num_workers: int | None = None,
        progress: bool = True,
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """The exact pictures of many (identity, view) pairs, drawn by worker processes.

        With `cache_dir` the result is kept there under a hash of what is drawn, and the returned
        array is memory-mapped. `num_workers` None takes one per core when there is enough work.
        """
        options = [self.options(identity, view) for identity, view in pairs]
        return avatar_render.draw_many(
            options, self.style, self.size, cache_dir, num_workers, progress
        )

    def uniform(self, *key: object) -> float:
        """A number in [0, 1) fixed by the split seed and the key."""
        text = "/".join(map(str, (self.style, self.split_seed, *key)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def class_indices(parts: Mapping[str, Sequence[str]], classes: Sequence[str]) -> dict[str, int]:
    """The place of one class of every part among the part's class names."""
    return {p: list(n).index(c) for (p, n), c in zip(parts.items(), classes, strict=True)}


def checked_split(split: str) -> str:
    """`split`, or ValueError if there is none of that name."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    return split
