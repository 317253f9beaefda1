"""Questions about real pictures, where no exact answer exists: other pictures of the same subject.

A subject's pictures are parted in two. The first `num_views` of its references are shown to the
methods: the first one is what the hypernetwork is given (the first k: `generated_k`), all of them
are what a conventional LoRA is fitted to. Its other targets, the *gallery*, are never shown to any
method; judges compare generated pictures with them (`picture_scores.py`). Every subject keeps its
own number of both: one with fewer pictures shows fewer, so that at least one is left to judge by.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, TypeVar

import numpy as np

from hyperlora_jax.array_types import Float, Int, Json, UInt8
from hyperlora_jax.evaluate.protocol import EvaluationSet, Questions, check_disjoint, unit_pixels
from hyperlora_jax.pictures import pictures
from hyperlora_jax.pictures.concepts import Concept
from hyperlora_jax.pictures.subjects import Subject

MOST_JUDGED_BY = 64  # gallery pictures of a subject; more tell a judge nothing new

# (subject's id, number of views) -> the first views as the encoder is shown them
Seen = Callable[[str, int], UInt8[np.ndarray, "v s s 3"]]


AnyNamed = TypeVar("AnyNamed", Subject, Concept)


@dataclasses.dataclass(frozen=True, eq=False)
class PictureSet(Questions):
    """Questions with other pictures of the same subject.

    Dimensions: i identities, c captions each, n candidates out of k.

    Attributes:
      gallery: held-out pictures of all k candidate subjects, the i identities first.
      candidates: rows of `gallery` to tell apart; column 0 is the true identity.
    """

    PER_IDENTITY: ClassVar[tuple[str, ...]] = (*Questions.PER_IDENTITY, "candidates")

    POOL: ClassVar[str] = "gallery"

    gallery: tuple[UInt8[np.ndarray, "_ h w 3"], ...]
    candidates: Int[np.ndarray, "i n"]

    @property
    def others(self) -> Float[np.ndarray, "i c h w 3"]:
        """One gallery picture of the same subject beside every question, in turn, in [0, 1]."""
        turn = np.arange(self.num_captions)
        own = self.gallery[: self.num_identities]
        return unit_pixels(np.stack([shown[turn % len(shown)] for shown in own]))


AnySet = EvaluationSet | PictureSet


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is asked of whom: the keys of the same names in a config's `evaluate` section."""

    num_identities: int
    num_validation: int
    num_captions: int
    num_views: int
    num_candidates: int


def held_out(subjects: Iterable[AnyNamed], trained_on: frozenset[str]) -> list[AnyNamed]:
    """One subject of every identity that was not trained on, under whatever name."""
    subjects = list(subjects)
    seen = trained_on | {s.identity for s in subjects if s.id in trained_on}
    free: dict[str, AnyNamed] = {}
    for subject in subjects:
        if subject.id not in seen and subject.identity not in seen:
            free.setdefault(subject.identity, subject)
    return list(free.values())


def in_order(subjects: Iterable[AnyNamed], split_seed: int) -> list[AnyNamed]:
    """By a hash of their identity and the seed: who is asked about does not depend on names."""
    return sorted(
        subjects, key=lambda s: hashlib.sha256(f"{split_seed}/{s.identity}".encode()).hexdigest()
    )


def parted(person: Subject, num_views: int) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """(pictures to show, pictures to judge by); no picture is in both, not even as a duplicate.

    At most `num_views` are shown, fewer where nothing else would be left to judge by; the second
    is empty where one picture is all there is.
    """
    views, others = person.references[:1], ()
    for count in range(min(num_views, len(person.references)), 0, -1):
        views = person.references[:count]
        others = tuple(png for png in person.targets if png not in views)
        if others:
            break
    return views, others[:MOST_JUDGED_BY]


def make_picture_sets(
    people: Sequence[Subject],
    sizes: Sizes,
    *,
    prompts: Sequence[str] = (),
    identity_seed: int = 0,
    training_ids: frozenset[str] = frozenset(),
    strangers: Sequence[Subject] = (),
    seen: Seen | None = None,
) -> tuple[PictureSet | None, PictureSet]:
    """(validation, test) sets; the first is None where `sizes` has nobody in it.

    Args:
      people: held-out subjects with at least two pictures each: the first `sizes.num_validation`
        choose strengths, the next `sizes.num_identities` are tested. `exams.py` makes sizes
        fit.
      prompts: tried in turn; without any, every subject's own captions.
      identity_seed: draws noise and candidates.
      training_ids: who was trained on.
      strangers: more subjects to tell a true one apart from, where `people` are too few.
      seen: what the condition encoder is shown of a subject; None: its views.

    Raises:
      UserError: somebody was trained on.
    """
    check_disjoint(people, training_ids)
    validation = people[: sizes.num_validation]
    test = people[sizes.num_validation : sizes.num_validation + sizes.num_identities]
    made = []
    for number, (chosen, rest) in enumerate(((validation, test), (test, validation))):
        split = ("validation", "test")[number]
        facts = {
            "split": split,
            "identity_seed": identity_seed,
            **dataclasses.asdict(dataclasses.replace(sizes, num_identities=len(chosen))),
            "checked_against": len(training_ids),
        }
        random = np.random.default_rng((identity_seed, number))
        rest = [*rest, *strangers]
        asked = _make(split, chosen, rest, prompts, sizes, random, facts, seen) if chosen else None
        made.append(asked)
    return made[0], made[1]


def _make(
    split: str,
    people: Sequence[Subject],
    rest: Sequence[Subject],
    prompts: Sequence[str],
    sizes: Sizes,
    random: np.random.Generator,
    facts: Json,
    seen: Seen | None,
) -> PictureSet:
    shown, captions, view_captions, gallery = [], [], [], []
    for person in people:
        views, others = parted(person, sizes.num_views)
        caption_of = dict(zip(person.targets, person.captions, strict=True))
        asked = list(prompts) or [caption_of[png] for png in others]
        shown.append(np.stack([pictures.decode(png) for png in views]))
        captions.append(tuple(asked[c % len(asked)] for c in range(sizes.num_captions)))
        view_captions.append(tuple(caption_of.get(png, asked[0]) for png in views))
        gallery.append(np.stack([pictures.decode(png) for png in others]))
    for person in rest:
        others = parted(person, sizes.num_views)[1] or person.targets
        gallery.append(np.stack([pictures.decode(png) for png in others]))
    rows = np.arange(len(gallery))
    strangers = [random.permutation(np.delete(rows, i)) for i in range(len(people))]
    return PictureSet(
        split=split,
        identities=tuple(people),
        captions=tuple(captions),
        views=tuple(shown),
        view_captions=tuple(view_captions),
        noise_seeds=random.integers(2**62, size=(len(people), sizes.num_captions)),
        facts={
            **facts,
            "pictures_shown": [len(own) for own in shown],
            "pictures_judged_by": [len(own) for own in gallery[: len(people)]],
        },
        seen=seen
        and tuple(seen(person.id, len(own)) for person, own in zip(people, shown, strict=True)),
        gallery=tuple(gallery),
        candidates=np.array(
            [[i, *row[: sizes.num_candidates - 1]] for i, row in enumerate(strangers)]
        ),
    )
