"""The avatar world: unlimited drawn identities, views of them with captions, exact pictures.

An identity is one class for every identity part of a style (hair, hair colour, ...), a view one
class for every view part (mouth, clothes, background, ...). For every (identity, caption) there is
one exact picture, so identity, prompt fidelity and image error can be measured without a judge.

Held out by part combination: some (hair x hair colour) pairs belong to validation, some to test,
the rest to training; likewise some (mouth, clothes, colour) combinations appear in evaluation
views only. Both reserves are fixed by `split_seed`.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.batches import stable_random
from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds import avatar_render, avatar_styles

SPLITS = ("train", "validation", "test")
HELD_OUT_IDENTITIES = 0.15
HELD_OUT_VIEWS = 0.10


@dataclasses.dataclass(frozen=True)
class Identity:
    """One drawn person: a class for every identity part, in the style's order."""

    style: str
    classes: tuple[str, ...]

    @property
    def id(self) -> str:
        """Stable name, e.g. "pixel-art/long03.603a14.ffdbac.no"."""
        return f"{self.style}/{'.'.join(self.classes)}"


@dataclasses.dataclass(frozen=True)
class View:
    """One way to show a person: a class for every view part; degrees, factor and flip if any."""

    style: str
    classes: tuple[str, ...]
    rotate: float = 0.0
    scale: float = 1.0
    flip: bool = False

    @property
    def id(self) -> str:
        """Stable name, e.g. "smiling.wide.no.blue.striped.red"."""
        pose = (f"r{self.rotate:+.1f}", f"s{self.scale:.2f}", "f" if self.flip else "n")
        posed = (self.rotate, self.scale, self.flip) != (0.0, 1.0, False)
        return ".".join(self.classes + (pose if posed else ()))


class Avatars:
    """Identities, views, captions and pictures of one style.

    Args:
        style: one of `avatar_styles.STYLES`.
        size: picture side in pixels; None is the style's own, 16 for pixel-art, 64 for the others.
        split_seed: fixes which part combinations are held out.
        poses: also draw rotation (+-12 degrees), scale (.85 to 1.1) and flip; not for pixel-art,
            whose pixels stay on the grid.
    """

    def __init__(
        self,
        style: str = "pixel-art",
        size: int | None = None,
        split_seed: int = 0,
        poses: bool = False,
    ):
        self.table = avatar_styles.load(style)
        self.style = style
        self.size = self.table.size if size is None else size
        self.split_seed = split_seed
        self.poses = poses
        if poses and self.table.grid:
            raise UserError(f"avatars: poses=True is not possible for {style}, it is a pixel grid")
        if not 8 <= self.size <= 1024:
            raise UserError(f"avatars: size is {self.size}, expected 8 to 1024 pixels")

    @property
    def licence(self) -> str:
        """Who drew this style and under which licence."""
        return self.table.licence

    @property
    def part_names(self) -> dict[str, list[str]]:
        """Every view part and its class names, in the order of `caption_parts`' indices."""
        return {part.name: list(part.classes) for part in self.table.view}

    @property
    def identity_part_names(self) -> dict[str, list[str]]:
        """Every identity part and its class names."""
        return {part.name: list(part.classes) for part in self.table.identity}

    def num_identities(self, split: str) -> int:
        """How many different identities a split has; `identity` repeats after that many."""
        return len(self._order(split))

    def identity(self, split: str, index: int) -> Identity:
        """The index-th identity of a split; all below `num_identities(split)` are different."""
        order = self._order(split)
        shape = [len(part.classes) for part in self.table.identity]
        indices = np.unravel_index(int(order[index % len(order)]), shape)
        classes = (p.classes[int(k)] for p, k in zip(self.table.identity, indices, strict=True))
        return Identity(self.style, tuple(classes))

    def identity_parts(self, identity: Identity) -> dict[str, int]:
        """Class index of every identity part."""
        return _class_indices(self.table.identity, identity.classes)

    def split_of(self, identity: Identity) -> str:
        """The split that an identity belongs to."""
        parts = dict(zip(self.identity_part_names, identity.classes, strict=True))
        return self._identity_reserve[tuple(parts[name] for name in self.table.reserved_identity)]

    def view(self, split: str, index: int) -> View:
        """The index-th random view. Training views never show a reserved combination, evaluation
        views (validation and test) always do.
        """
        _check_split(split)
        reserve = self._view_reserve
        chosen: dict[str, str] = {}
        for attempt in itertools.count():
            draw = functools.partial(self._uniform, "view", split, index, attempt)
            chosen = {part.name: _pick(part, draw(part.name)) for part in self.table.view}
            combination = tuple(chosen[name] for name in self.table.reserved_view)
            if split == "train" and combination not in reserve:
                break
            if split != "train":
                combination = reserve_pick(sorted(reserve), draw("reserve"))
                chosen.update(zip(self.table.reserved_view, combination, strict=True))
                break
        classes = tuple(chosen[part.name] for part in self.table.view)
        if not self.poses:
            return View(self.style, classes)
        pose = [self._uniform("pose", split, index, k) for k in range(3)]
        rotate, scale = round(24 * pose[0] - 12, 1), round(0.85 + 0.25 * pose[1], 2)
        return View(self.style, classes, rotate, scale, pose[2] < 0.5)

    def views(self, split: str, count: int, start: int = 0) -> list[View]:
        """`count` views of a split from index `start`."""
        return [self.view(split, start + k) for k in range(count)]

    def view_of(self, classes: Sequence[str]) -> View:
        """The view of a class for every view part."""
        return View(self.style, tuple(classes))

    def is_reserved(self, view: View) -> bool:
        """Whether the view's combination is kept for evaluation."""
        parts = dict(zip(self.part_names, view.classes, strict=True))
        return tuple(parts[name] for name in self.table.reserved_view) in self._view_reserve

    def caption(self, view: View) -> str:
        """The view's parts in words; the identity is not in it."""
        return self.table.caption.format(**dict(zip(self.part_names, view.classes, strict=True)))

    def caption_parts(self, view: View) -> dict[str, int]:
        """Class index of every view part."""
        return _class_indices(self.table.view, view.classes)

    def vocabulary(self) -> list[str]:
        """All words that captions use, sorted."""
        words = {w for w in self.table.caption.split() if not w.startswith("{")}
        words.update(name for part in self.table.view for name in part.classes)
        return sorted(words)

    def render(self, identity: Identity, view: View) -> UInt8[np.ndarray, "h w 3"]:
        """The exact picture of an identity in a view."""
        return avatar_render.draw(self.options(identity, view), self.style, self.size)

    def render_many(
        self,
        pairs: Sequence[tuple[Identity, View]],
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

    def options(self, identity: Identity, view: View) -> dict[str, str | int | float]:
        """What the drawing library is given: every option fixed, nothing left to its own dice."""
        for given in (identity, view):
            if given.style != self.style:
                raise ValueError(f"{given.id} is of style {given.style}, these are {self.style}")
        drawn: dict[str, str | int | float] = dict(avatar_render.neutral_options(self.style))
        parts = zip(
            self.table.identity + self.table.view, identity.classes + view.classes, strict=True
        )
        for part, name in parts:
            value = part.values[part.classes.index(name)]
            if part.is_color:
                drawn[part.option] = value or ""
            elif value is None:
                drawn[part.option + "Probability"] = 0
            else:
                drawn[part.option + "Variant"] = value
                drawn[part.option + "Probability"] = 100
        drawn.update(self.table.fixed)
        drawn.update({option: drawn[source] for option, source in self.table.linked})
        if (view.rotate, view.scale, view.flip) != (0.0, 1.0, False):
            drawn.update(rotate=view.rotate, scale=view.scale)
            drawn["flip"] = "horizontal" if view.flip else "none"
        return drawn

    @functools.cached_property
    def _identity_reserve(self) -> dict[tuple[str, ...], str]:
        """Split of every combination of the reserved identity parts."""
        by_name = self.identity_part_names
        combinations = list(itertools.product(*(by_name[n] for n in self.table.reserved_identity)))
        combinations.sort(key=lambda c: self._uniform("identity reserve", *c))
        held_out = max(2, round(HELD_OUT_IDENTITIES * len(combinations)))
        return {
            c: "train" if k >= held_out else ("validation", "test")[k % 2]
            for k, c in enumerate(combinations)
        }

    @functools.cached_property
    def _view_reserve(self) -> frozenset[tuple[str, ...]]:
        """Combinations of the reserved view parts that training never shows."""
        by_name = self.part_names
        combinations = list(itertools.product(*(by_name[n] for n in self.table.reserved_view)))
        combinations.sort(key=lambda c: self._uniform("view reserve", *c))
        return frozenset(combinations[: max(1, round(HELD_OUT_VIEWS * len(combinations)))])

    @functools.cached_property
    def _orders(self) -> dict[str, np.ndarray]:
        return {}

    def _order(self, split: str) -> np.ndarray:
        """Flat identity numbers of a split in drawing order: a weighted sample without
        replacement (Efraimidis and Spirakis 2006: ascending -log(u) / weight).
        """
        _check_split(split)
        if split not in self._orders:
            parts = self.table.identity
            shape = [len(part.classes) for part in parts]
            names = [part.name for part in parts]
            axes = [names.index(n) for n in self.table.reserved_identity]
            allowed = np.zeros([shape[a] for a in axes], bool)
            for combination, owner in self._identity_reserve.items():
                at = [parts[a].classes.index(c) for a, c in zip(axes, combination, strict=True)]
                allowed[tuple(at)] = owner == split
            indices = np.indices(shape).reshape(len(shape), -1)
            members = np.flatnonzero(allowed[tuple(indices[a] for a in axes)])
            weight = np.ones(len(members))
            for part, index in zip(parts, indices, strict=True):
                weight *= np.asarray(part.weights)[index[members]]
            seed = int(self._uniform("identity", split) * 2**53)
            self._orders[split] = members[
                np.argsort(-np.log(stable_random.uniforms(seed, members)) / weight)
            ]
        return self._orders[split]

    def _uniform(self, *key: object) -> float:
        """A number in [0, 1) fixed by the style, the split seed and the key."""
        text = "/".join(map(str, (self.style, self.split_seed, *key)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def reserve_pick(combinations: Sequence[tuple[str, ...]], u: float) -> tuple[str, ...]:
    """The combination at the fraction u of a list."""
    return combinations[int(u * len(combinations))]


def _pick(part: avatar_styles.Part, u: float) -> str:
    return part.classes[int(np.searchsorted(np.cumsum(part.weights)[:-1], u, side="right"))]


def _class_indices(parts: Sequence[avatar_styles.Part], classes: Sequence[str]) -> dict[str, int]:
    return {p.name: p.classes.index(c) for p, c in zip(parts, classes, strict=True)}


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
