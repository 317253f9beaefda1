"""What every method is asked: identities, captions and start noise, the same for all of them.

`protocol.EvaluationSet` adds exact answers, `picture_sets.PictureSet` other pictures of the same
subject where no exact answer exists.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from hyperlora_jax.array_types import Float, Int, UInt8
from hyperlora_jax.errors import UserError

Asked = TypeVar("Asked", bound="Questions")


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """One fixed set of questions about i identities, c captions each, told by v views.

    Attributes:
      split: "validation" or "test".
      identities: the held-out identities.
      captions: c captions per identity.
      views: pictures of every identity, of each its own number; the first is the reference, all of
        them together are what a conventional LoRA is trained on.
      view_captions: their captions.
      noise_seeds: one per picture, see `noise`.
      facts: what it was made from, JSON-able.
      seen: the references as the condition encoder is shown them, where its size is another.
    """

    PER_IDENTITY: ClassVar[tuple[str, ...]] = (
        "identities", "captions", "views", "view_captions", "noise_seeds", "seen",
    )  # fmt: skip

    POOL: ClassVar[str] = ""  # the field whose rows `candidates` names, if there are any

    split: str
    identities: tuple[Any, ...]
    captions: tuple[tuple[str, ...], ...]
    views: UInt8[np.ndarray, "i v h w 3"] | tuple[UInt8[np.ndarray, "_ h w 3"], ...]
    view_captions: tuple[tuple[str, ...], ...]
    noise_seeds: Int[np.ndarray, "i c"]
    facts: Mapping[str, Any]
    seen: UInt8[np.ndarray, "i s s 3"] | None = dataclasses.field(default=None, kw_only=True)

    @property
    def num_identities(self) -> int:
        """Number of identities i."""
        return len(self.identities)

    @property
    def num_captions(self) -> int:
        """Captions per identity c."""
        return self.noise_seeds.shape[1]

    @property
    def references(self) -> Float[np.ndarray, "i h w 3"]:
        """The reference picture of every identity, in [0, 1]."""
        return unit_pixels(np.stack([own[0] for own in self.views]))

    @property
    def conditions(self) -> Float[np.ndarray, "i s s2 3"]:
        """The reference pictures as the condition encoder is shown them, in [0, 1]."""
        return self.references if self.seen is None else unit_pixels(self.seen)

    def noise(self, shape: Sequence[int]) -> Float[np.ndarray, "i c *shape"]:
        """Standard normal start noise, the same on every machine and for every method."""
        draws = [
            np.random.default_rng(int(seed)).standard_normal(shape, np.float32)
            for seed in self.noise_seeds.ravel()
        ]
        return np.stack(draws).reshape(*self.noise_seeds.shape, *shape)

    def first(self: Asked, count: int) -> Asked:
        """The same questions for the first `count` identities (all, if they are fewer);
        candidates stay what they were."""
        return self.select(range(min(count, self.num_identities)))

    def select(self: Asked, numbers: Sequence[int]) -> Asked:
        """The same questions for the identities of these numbers, in their order."""
        chosen = np.asarray(numbers, np.int64)
        cut: dict[str, Any] = {}
        for name in self.PER_IDENTITY:
            values = getattr(self, name)
            cut[name] = None if values is None else _rows(values, chosen)
        if self.POOL:
            # It starts with the identities: they change places with the rows that stood there.
            pool = getattr(self, self.POOL)
            order = np.concatenate([chosen, np.setdiff1d(np.arange(len(pool)), chosen)])
            cut[self.POOL] = _rows(pool, order)
            cut["candidates"] = np.argsort(order)[cut["candidates"]]
        return dataclasses.replace(self, **cut)


def _rows(values: np.ndarray | tuple[Any, ...], chosen: Int[np.ndarray, " n"]) -> Any:
    if isinstance(values, np.ndarray):
        return values[chosen]
    return tuple(values[int(i)] for i in chosen)


def check_disjoint(identities: Sequence[Any], trained: frozenset[str]) -> None:
    """Raises UserError when an identity was trained on."""
    leaked = [person.id for person in identities if person.id in trained]
    if leaked:
        raise UserError(
            f"evaluate.identity_seed: {len(leaked)} of {len(identities)} identities were trained "
            f"on (first: {leaked[0]}), expected none; was the checkpoint made with another "
            "data.split_seed?"
        )


def unit_pixels(pixels: UInt8[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """Bytes as float32 in [0, 1]."""
    return pixels.astype(np.float32) / 255.0
