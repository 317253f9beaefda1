"""Sizes that fit: how many subjects, candidates and views an exam can have of what there is.

What somebody gave on the command line is kept, and refused where the source does not offer it; a
config's defaults are cut to what it offers, and that is said.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.picture_sets import Sizes

NAMES = tuple(field.name for field in dataclasses.fields(Sizes))


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a source of pictures has.

    Attributes:
        source: what messages call it.
        num_held_out: subjects that were not trained on and can be judged.
        num_candidates: subjects to tell apart, those and others.
        num_views: pictures that can be shown of every held-out subject while one is left to judge
            by.
        num_pictures: different ones that every held-out subject has.
    """

    source: str
    num_held_out: int
    num_candidates: int
    num_views: Sequence[int]
    num_pictures: Sequence[int]


def asked_sizes(section: Any) -> Sizes:
    """What a config's `evaluate` section asks for.

    Raises:
        UserError: a number that cannot be.
    """
    sizes = Sizes(**{name: section[name] for name in NAMES})
    least = {"num_identities": 1, "num_validation": 0, "num_candidates": 2}
    for name, value in dataclasses.asdict(sizes).items():
        if value < least.get(name, 1):
            raise UserError(
                f"--config.evaluate.{name}: got {value}, expected {least.get(name, 1)} or more"
            )
    return sizes


def fitting_sizes(asked: Sizes, given: frozenset[str], offer: Offer) -> tuple[Sizes, str]:
    """The sizes to use, and a line that says what was cut ("" = nothing).

    Args:
        asked: of the config.
        given: dotted names of the keys that somebody gave a value of their own.

    Raises:
        UserError: nobody is held out, fewer than two subjects to tell apart, or a given number that
            the source does not offer.
    """
    explicit = {name for name in NAMES if f"evaluate.{name}" in given}
    validation, identities = _parted(asked, explicit, offer)
    if offer.num_candidates < 2:
        raise UserError(
            f"{offer.source}: has {offer.num_candidates} subject that can be judged, expected at "
            "least 2 to tell apart"
        )
    candidates = min(asked.num_candidates, offer.num_candidates)
    if candidates < asked.num_candidates and "num_candidates" in explicit:
        raise _not_there("num_candidates", asked, offer.num_candidates, "subjects", offer.source)
    fitted = dataclasses.replace(
        asked,
        num_identities=identities,
        num_validation=validation,
        num_candidates=candidates,
        num_views=_views(asked, explicit, offer),
    )
    return fitted, _said(asked, fitted, offer.source)


def fitting_splits(
    asked: Sizes, given: frozenset[str], source: str, num_validation: int, num_test: int
) -> tuple[Sizes, str]:
    """`fitting_sizes` for a drawn world, which has so many identities in its held-out splits and
    as many pictures of each as one likes."""
    there = {
        "num_identities": num_test,
        "num_validation": num_validation,
        "num_candidates": min(num_validation, num_test),
    }
    for name, count in there.items():
        if getattr(asked, name) > count and f"evaluate.{name}" in given:
            raise _not_there(name, asked, count, "held-out identities", source)
    fitted = dataclasses.replace(
        asked, **{name: min(getattr(asked, name), count) for name, count in there.items()}
    )
    return fitted, _said(asked, fitted, source)


def _said(asked: Sizes, fitted: Sizes, source: str) -> str:
    changed = [
        f"{name} {getattr(fitted, name)} instead of {getattr(asked, name)}"
        for name in NAMES
        if getattr(fitted, name) != getattr(asked, name)
    ]
    return f"sizes that fit {source}: {', '.join(changed)}" if changed else ""


def _parted(asked: Sizes, explicit: set[str], offer: Offer) -> tuple[int, int]:
    """(subjects to choose strengths on, subjects to test)."""
    there, validation, identities = offer.num_held_out, asked.num_validation, asked.num_identities
    if validation + identities <= there:
        return validation, identities
    held_out = "subjects that were not trained on and have two pictures or more"
    if "num_identities" in explicit:
        kept = validation if "num_validation" in explicit else 0
        if identities + kept > there:
            raise _not_there("num_identities", asked, there - kept, held_out, offer.source)
        return min(validation, there - identities), identities
    if "num_validation" in explicit:
        if validation >= there:
            raise _not_there("num_validation", asked, there - 1, held_out, offer.source)
        return validation, there - validation
    share = round(there * validation / (validation + identities))
    validation = min(validation, max(1, share), there - 1)
    return validation, min(identities, there - validation)


def _views(asked: Sizes, explicit: set[str], offer: Offer) -> int:
    most = max(offer.num_views)
    if "num_views" in explicit:
        if asked.num_views > most:
            raise _not_there("num_views", asked, most, "pictures of a subject", offer.source)
        return asked.num_views
    # Half of what the subject in the middle has: the other half is left to judge by.
    middle = sorted(offer.num_pictures)[len(offer.num_pictures) // 2]
    return min(asked.num_views, most, max(1, middle // 2))


def _not_there(name: str, asked: Sizes, there: int, what: str, source: str) -> UserError:
    return UserError(
        f"--config.evaluate.{name}: got {getattr(asked, name)}, but {source} has "
        f"{max(there, 0)} {what} for it"
    )
