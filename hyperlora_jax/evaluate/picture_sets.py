"""Questions about real pictures, where no exact answer exists: other pictures of the same subject.

A subject's pictures are parted in two. The first `num_views` (the references of its metadata, where
it says which) are shown to the methods: the first is the hypernetwork's reference, all of them are
what a conventional LoRA is fitted to. The others, its *gallery*, are never shown to any method;
judges compare generated pictures with them (`picture_scores.py`).
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from hyperlora_jax.array_types import Float, Int, UInt8
from hyperlora_jax.data import pictures
from hyperlora_jax.data.subjects import Subject
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.protocol import EvaluationSet
from hyperlora_jax.evaluate.questions import Questions, check_disjoint, unit_pixels


@dataclasses.dataclass(frozen=True, eq=False)
class PictureSet(Questions):
    """Questions with other pictures of the same subject.

    Dimensions: i identities, c captions each, v views, g gallery pictures, n candidates out of k.

    Attributes:
      gallery: held-out pictures of all k candidate subjects, the i identities first.
      candidates: rows of `gallery` to tell apart; column 0 is the true identity.
    """

    PER_IDENTITY: ClassVar[tuple[str, ...]] = (*Questions.PER_IDENTITY, "candidates")

    POOL: ClassVar[str] = "gallery"

    gallery: UInt8[np.ndarray, "k g h w 3"]
    candidates: Int[np.ndarray, "i n"]

    @property
    def others(self) -> Float[np.ndarray, "i c h w 3"]:
        """One gallery picture of the same subject beside every question, in turn, in [0, 1]."""
        turn = np.arange(self.num_captions) % self.gallery.shape[1]
        return unit_pixels(self.gallery[: self.num_identities, turn])


AnySet = EvaluationSet | PictureSet


def held_out(subjects: Sequence[Subject], trained_on: frozenset[str]) -> list[Subject]:
    """One subject of every identity that was not trained on, under whatever name."""
    known = trained_on | {s.identity for s in subjects if s.id in trained_on}
    found: dict[str, Subject] = {}
    for subject in subjects:
        if subject.id not in known and subject.identity not in known:
            found.setdefault(subject.identity, subject)
    return list(found.values())


def make_picture_sets(
    subjects: Sequence[Subject],
    source: str,
    *,
    prompts: Sequence[str] = (),
    split_seed: int = 0,
    identity_seed: int = 0,
    num_identities: int,
    num_validation: int,
    num_captions: int,
    num_views: int,
    num_candidates: int,
    training_ids: frozenset[str] = frozenset(),
) -> tuple[PictureSet, PictureSet]:
    """(validation, test) sets of subjects that were not trained on.

    Held-out subjects are ordered by a hash of their identity and `split_seed`; the first
    `num_validation` choose strengths, the next `num_identities` are tested.

    Args:
      subjects: everyone in the image set, trained on or not.
      source: what the image set is called in messages and facts.
      prompts: tried in turn; without any, every subject's own captions.
      identity_seed: draws noise and candidates.
      num_candidates: subjects to tell apart, the true one included.

    Raises:
      UserError: too few held-out subjects, or one with too few pictures.
    """
    needed = num_validation + num_identities
    if not 2 <= num_candidates <= needed or not num_validation:
        raise UserError(
            f"evaluate.num_candidates: found {num_candidates}, expected 2 to the {needed} subjects "
            f"of both splits (evaluate.num_validation {num_validation}, at least 1)"
        )
    people = _newcomers(subjects, source, needed, split_seed, training_ids)
    check_disjoint(people, training_ids)
    num_gallery = _smallest_gallery(people, source, num_views)
    validation, test = people[:num_validation], people[num_validation:]
    made = []
    for number, (chosen, rest) in enumerate(((validation, test), (test, validation))):
        split = ("validation", "test")[number]
        facts = {
            "source": source,
            "split": split,
            "split_seed": split_seed,
            "identity_seed": identity_seed,
            "num_identities": len(chosen),
            "num_captions": num_captions,
            "num_views": num_views,
            "num_gallery": num_gallery,
            "num_candidates": num_candidates,
            "checked_against": len(training_ids),
        }
        sizes = num_captions, num_views, num_gallery, num_candidates
        random = np.random.default_rng((identity_seed, number))
        made.append(_make(split, chosen, rest, prompts, sizes, random, facts))
    return made[0], made[1]


def _newcomers(
    subjects: Sequence[Subject],
    source: str,
    needed: int,
    split_seed: int,
    training_ids: frozenset[str],
) -> list[Subject]:
    """As many subjects that were not trained on as are needed, in the split's order."""
    free = held_out(subjects, training_ids)
    if len(free) < needed:
        raise UserError(
            f"{source}: found {len(free)} identities that were not trained on (of {len(subjects)} "
            f"subjects), expected {needed}: evaluate.num_validation + evaluate.num_identities"
        )
    return sorted(free, key=lambda s: _order(s.identity, split_seed))[:needed]


def _smallest_gallery(people: Sequence[Subject], source: str, num_views: int) -> int:
    """How many pictures everybody has beside those to show."""
    counts = [len(_parted(person, num_views)[1]) for person in people]
    if not min(counts):
        raise UserError(
            f"{source}/{people[counts.index(0)].id}: has too few pictures, expected "
            f"evaluate.num_views ({num_views}) to show and at least one more to judge by"
        )
    return min(counts)


def _make(
    split: str,
    people: Sequence[Subject],
    rest: Sequence[Subject],
    prompts: Sequence[str],
    sizes: tuple[int, int, int, int],
    random: np.random.Generator,
    facts: dict[str, Any],
) -> PictureSet:
    num_captions, num_views, num_gallery, num_candidates = sizes
    shown, captions, view_captions = [], [], []
    for person in people:
        views, others = _parted(person, num_views)
        caption_of = dict(zip(person.targets, person.captions, strict=True))
        asked = list(prompts) or [caption_of[png] for png in others]
        shown.append(np.stack([pictures.decode(views[k % len(views)]) for k in range(num_views)]))
        captions.append(tuple(asked[c % len(asked)] for c in range(num_captions)))
        words = [caption_of.get(png, asked[0]) for png in views]
        view_captions.append(tuple(words[k % len(words)] for k in range(num_views)))
    gallery = [
        np.stack([pictures.decode(png) for png in _parted(person, num_views)[1][:num_gallery]])
        for person in (*people, *rest)
    ]
    rows = np.arange(len(gallery))
    strangers = [random.permutation(np.delete(rows, i)) for i in range(len(people))]
    return PictureSet(
        split=split,
        identities=tuple(people),
        captions=tuple(captions),
        views=np.stack(shown),
        view_captions=tuple(view_captions),
        noise_seeds=random.integers(2**62, size=(len(people), num_captions)),
        facts=facts,
        gallery=np.stack(gallery),
        candidates=np.array([[i, *row[: num_candidates - 1]] for i, row in enumerate(strangers)]),
    )


def _parted(person: Subject, num_views: int) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """(pictures to show, pictures to judge by); no picture is in both, not even as a duplicate."""
    views = person.references[:num_views]
    return views, tuple(png for png in person.targets if png not in views)


def _order(identity: str, split_seed: int) -> str:
    return hashlib.sha256(f"{split_seed}/{identity}".encode()).hexdigest()
