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
import itertools

import numpy as np

from hyperlora_jax.batches import stable_random
from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds import avatar_render, avatar_styles
from hyperlora_jax.worlds.named_views import NamedView, NamedViews, checked_split, class_indices

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


class Avatars(NamedViews):
    """Identities, views, captions and pictures of one style.

    Args:
        style: one of `avatar_styles.STYLES`.
        size: picture side in pixels; None is the style's own, 16 for pixel-art, 64 for the others.
        split_seed: fixes which part combinations are held out.
    """

    def __init__(self, style: str = "pixel-art", size: int | None = None, split_seed: int = 0):
        self.table = avatar_styles.load(style)
        self.style = style
        self.size = self.table.size if size is None else size
        self.split_seed = split_seed
        self.view_parts = {part.name: list(part.classes) for part in self.table.view}
        self.reserved = self.table.reserved_view
        if not 8 <= self.size <= 1024:
            raise UserError(f"avatars: size is {self.size}, expected 8 to 1024 pixels")

    @property
    def licence(self) -> str:
        """Who drew this style and under which licence."""
        return self.table.licence

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
        return class_indices(self.identity_part_names, identity.classes)

    def view(self, split: str, index: int) -> NamedView:
        """See `NamedViews`."""
        checked_split(split)
        reserve = self._view_reserve
        chosen: dict[str, str] = {}
        for attempt in itertools.count():
            draw = functools.partial(self.uniform, "view", split, index, attempt)
            chosen = {part.name: _pick(part, draw(part.name)) for part in self.table.view}
            combination = tuple(chosen[name] for name in self.reserved)
            if split == "train" and combination not in reserve:
                break
            if split != "train":
                combination = sorted(reserve)[int(draw("reserve") * len(reserve))]
                chosen.update(zip(self.reserved, combination, strict=True))
                break
        return NamedView(tuple(chosen[part.name] for part in self.table.view))

    def is_reserved(self, view: NamedView) -> bool:
        """See `NamedViews`: here a fixed share of all combinations is reserved."""
        return self.combination(view) in self._view_reserve

    def caption(self, view: NamedView) -> str:
        """The view's parts in words; the identity is not in it."""
        return self.table.caption.format(**dict(zip(self.part_names, view.classes, strict=True)))

    def options(self, identity: Identity, view: NamedView) -> dict[str, str | int | float]:
        """What the drawing library is given: every option fixed, nothing left to its own dice."""
        if identity.style != self.style:
            raise ValueError(f"{identity.id} is of style {identity.style}, these are {self.style}")
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
        return drawn

    @functools.cached_property
    def _identity_reserve(self) -> dict[tuple[str, ...], str]:
        """Split of every combination of the reserved identity parts."""
        by_name = self.identity_part_names
        combinations = list(itertools.product(*(by_name[n] for n in self.table.reserved_identity)))
        combinations.sort(key=lambda c: self.uniform("identity reserve", *c))
        held_out = max(2, round(HELD_OUT_IDENTITIES * len(combinations)))
        return {
            c: "train" if k >= held_out else ("validation", "test")[k % 2]
            for k, c in enumerate(combinations)
        }

    @functools.cached_property
    def _view_reserve(self) -> frozenset[tuple[str, ...]]:
        """Combinations of the reserved view parts that training never shows."""
        combinations = list(itertools.product(*(self.view_parts[n] for n in self.reserved)))
        combinations.sort(key=lambda c: self.uniform("view reserve", *c))
        return frozenset(combinations[: max(1, round(HELD_OUT_VIEWS * len(combinations)))])

    @functools.cached_property
    def _orders(self) -> dict[str, np.ndarray]:
        return {}

    def _order(self, split: str) -> np.ndarray:
        """Flat identity numbers of a split in drawing order: a weighted sample without
        replacement (Efraimidis and Spirakis 2006: ascending -log(u) / weight).
        """
        checked_split(split)
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
            seed = int(self.uniform("identity", split) * 2**53)
            self._orders[split] = members[
                np.argsort(-np.log(stable_random.uniforms(seed, members)) / weight)
            ]
        return self._orders[split]


def _pick(part: avatar_styles.Part, u: float) -> str:
    return part.classes[int(np.searchsorted(np.cumsum(part.weights)[:-1], u, side="right"))]
