"""Who is evaluated, under which captions, from which noise: the same for every method.

Identities come from the held-out reserve (fixed by the avatars' `split_seed`); `identity_seed` only
draws from it. The draw is checked against the identities that a checkpoint was trained on.
Strengths are chosen on the validation reserve, scores are told on the test reserve.

`Questions` is what every method is asked; `EvaluationSet` adds exact answers,
`picture_sets.PictureSet` other pictures of the same subject where no exact answer exists.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from hyperlora_jax.array_types import Float, Int, Json, UInt8
from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds.by_style import World

Asked = TypeVar("Asked", bound="Questions")


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """One fixed set of questions about i identities, c captions each, told by v views.

    Attributes:
      split: "validation" or "test".
      identities: the held-out identities.
      captions: c captions per identity.
      views: pictures of every identity, of each its own number; the first is the reference, the
        first k are what `generated_k` is given, all of them what a conventional LoRA is trained on.
      view_captions: their captions.
      noise_seeds: one per picture, see `noise`.
      facts: what it was made from, JSON-able.
      seen: the views as the condition encoder is shown them, where its size is another.
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
    facts: Json
    seen: tuple[UInt8[np.ndarray, "_ s s 3"], ...] | None = dataclasses.field(
        default=None, kw_only=True
    )

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
    def seen_references(self) -> Float[np.ndarray, "i s s2 3"]:
        """The reference pictures as the condition encoder is shown them, in [0, 1]."""
        return np.stack([own[0] for own in self.first_views(1)])

    def first_views(self, count: int) -> list[Float[np.ndarray, "_ s s2 3"]]:
        """The first `count` views of every identity, or all where there are fewer, as the
        condition encoder is shown them, in [0, 1]."""
        shown = self.views if self.seen is None else self.seen
        return [unit_pixels(own[:count]) for own in shown]

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
        cut = {}
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


def _rows(values: np.ndarray | tuple, chosen: Int[np.ndarray, " n"]) -> np.ndarray | tuple:
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


REFERENCE_VIEWS_START = 10_000_000  # training-like views that no training run has drawn


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSet(Questions):
    """Questions with exact answers.

    Dimensions: i identities, c captions each, v views, p pooled captions, n candidates out of k.

    Attributes:
      caption_labels: class index of every caption part; training has seen none of the captions'
        part combinations.
      pool: exact renders of all k candidate identities (the i identities first) under all p
        pooled captions.
      caption_index: which pooled caption is identity i's c-th.
      candidates: rows of `pool` to tell apart; column 0 is the true identity.
      parts: {caption part: class names}.
    """

    PER_IDENTITY: ClassVar[tuple[str, ...]] = (
        *Questions.PER_IDENTITY, "caption_labels", "caption_index", "candidates",
    )  # fmt: skip

    POOL: ClassVar[str] = "pool"

    caption_labels: Int[np.ndarray, "i c q"]
    pool: UInt8[np.ndarray, "k p h w 3"]
    caption_index: Int[np.ndarray, "i c"]
    candidates: Int[np.ndarray, "i n"]
    parts: Mapping[str, tuple[str, ...]]

    @property
    def exact(self) -> Float[np.ndarray, "i c h w 3"]:
        """The exact picture for every identity and caption, in [0, 1]."""
        rows = np.arange(self.num_identities)[:, None]
        return unit_pixels(self.pool[rows, self.caption_index])

    def candidate_renders(self, index: int) -> Float[np.ndarray, "c n h w 3"]:
        """Exact renders of identity `index`'s candidates under its captions; column 0 is true."""
        captions = self.caption_index[index][:, None]
        return unit_pixels(self.pool[self.candidates[index][None, :], captions])


def make_evaluation_set(  # noqa: PLR0913
    avatars: World,
    *,
    split: str = "test",
    identity_seed: int = 0,
    num_identities: int = 64,
    num_captions: int = 8,
    num_views: int = 8,
    num_candidates: int = 32,
    num_pooled_captions: int = 32,
    training_ids: frozenset[str] = frozenset(),
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> EvaluationSet:
    """Draws a set from a reserve of `avatars`.

    Captions are taken from a pool that all identities share (so that every candidate can be drawn
    under every caption cheaply); every identity gets its own choice of `num_captions` from it.

    Args:
      avatars: the world.
      split: "validation" or "test".
      identity_seed: draws identities, captions, candidates and noise.
      num_identities: i; when fewer than `num_candidates`, others are drawn to tell apart from.
      num_captions: c per identity.
      num_views: v, what a conventional LoRA sees.
      num_candidates: N.
      num_pooled_captions: p, at least `num_captions`.
      training_ids: identity ids that training saw (see `training_ids`).
      cache_dir: where renders are kept.
      progress: whether to show it.

    Raises:
      UserError: the reserve is too small or contains identities that were trained on.
    """
    num_pooled = max(num_identities, num_candidates)
    _check(avatars, split, num_pooled, num_captions, num_candidates, num_pooled_captions)
    random = np.random.default_rng((identity_seed, ("validation", "test").index(split)))
    everyone = _draw_identities(avatars, split, num_pooled, random)
    people = everyone[:num_identities]
    check_disjoint(people, training_ids)
    start = identity_seed * num_pooled_captions
    pooled = avatars.views(split, num_pooled_captions, start)
    start = REFERENCE_VIEWS_START + identity_seed * num_identities * num_views
    own = [avatars.views("train", num_views, start + i * num_views) for i in range(len(people))]
    pairs = [(person, view) for person in everyone for view in pooled]
    pairs += [(person, view) for person, views in zip(people, own, strict=True) for view in views]
    drawn = np.asarray(avatars.render_many(pairs, cache_dir, progress=progress))
    split_at = num_pooled * num_pooled_captions
    index = np.stack(
        [random.permutation(num_pooled_captions)[:num_captions] for _ in range(num_identities)]
    )
    labels = np.array([list(avatars.caption_parts(view).values()) for view in pooled])
    texts = [avatars.caption(view) for view in pooled]
    return EvaluationSet(
        split=split,
        identities=tuple(people),
        captions=tuple(tuple(texts[k] for k in row) for row in index),
        caption_labels=labels[index],
        views=drawn[split_at:].reshape(num_identities, num_views, *drawn.shape[1:]),
        view_captions=tuple(tuple(avatars.caption(v) for v in views) for views in own),
        pool=drawn[:split_at].reshape(num_pooled, num_pooled_captions, *drawn.shape[1:]),
        caption_index=index,
        candidates=_draw_candidates(num_identities, num_pooled, num_candidates, random),
        noise_seeds=random.integers(2**62, size=(num_identities, num_captions)),
        parts={part: tuple(names) for part, names in avatars.part_names.items()},
        facts={
            "style": avatars.style,
            "licence": avatars.licence,
            "split": split,
            "split_seed": avatars.split_seed,
            "identity_seed": identity_seed,
            "num_identities": num_identities,
            "num_captions": num_captions,
            "num_views": num_views,
            "num_candidates": num_candidates,
            "checked_against": len(training_ids),
        },
    )


def training_ids(avatars: World, start: int, count: int) -> frozenset[str]:
    """Ids of the training identities `start` .. `start + count` of a world."""
    return frozenset(avatars.identity("train", start + k).id for k in range(count))


def _draw_identities(
    avatars: World, split: str, count: int, random: np.random.Generator
) -> list[Any]:
    # A split's order is weighted by how common its parts are; all of it, drawn evenly, would be
    # nothing but rare beards. Its first quarter looks like what training saw.
    reach = max(count, avatars.num_identities(split) // 4)
    return [avatars.identity(split, int(k)) for k in random.permutation(reach)[:count]]


def _draw_candidates(
    count: int, num_pooled: int, num_candidates: int, random: np.random.Generator
) -> np.ndarray:
    rows = []
    for i in range(count):
        others = np.delete(np.arange(num_pooled), i)
        rows.append([i, *random.permutation(others)[: num_candidates - 1]])
    return np.array(rows)


def _check(
    avatars: World,
    split: str,
    num_pooled: int,
    num_captions: int,
    num_candidates: int,
    num_pooled_captions: int,
) -> None:
    if split not in ("validation", "test"):
        raise ValueError(f"split must be held out. Got: {split=}")
    available = avatars.num_identities(split)
    if num_pooled > available:
        raise UserError(
            f"evaluate.num_identities: found {num_pooled} (or as many candidates), "
            f"but {avatars.style} has only {available} {split} identities"
        )
    if num_candidates < 2:
        raise UserError(f"evaluate.num_candidates: found {num_candidates}, expected at least 2")
    if not 1 <= num_captions <= num_pooled_captions:
        raise UserError(
            f"evaluate.num_captions: found {num_captions}, "
            f"expected 1 to {num_pooled_captions} (evaluate.num_pooled_captions)"
        )
