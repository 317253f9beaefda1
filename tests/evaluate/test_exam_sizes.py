import dataclasses

import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.exams import Offer, asked_sizes, fitting_sizes, fitting_splits
from hyperlora_jax.evaluate.picture_sets import Sizes

USUAL = Sizes(
    num_identities=64, num_validation=16, num_captions=8, num_views=8, num_candidates=32
)  # fmt: skip


def offer(held_out, candidates=6, pictures=(4, 5, 6)):
    return Offer("faces", held_out, candidates, [count - 1 for count in pictures], pictures)


def fit(there, given=(), **asked):
    sizes = dataclasses.replace(USUAL, **asked)
    return fitting_sizes(sizes, frozenset(f"evaluate.{name}" for name in given), there)


def test_what_is_there_is_left_as_it_is():
    there = offer(100, 100, (20,) * 100)
    assert fit(there) == (USUAL, "")


@pytest.mark.parametrize(
    ("held_out", "parted"), [(1, (0, 1)), (2, (1, 1)), (3, (1, 2)), (10, (2, 8)), (79, (16, 63))]
)
def test_defaults_are_cut_and_that_is_said(held_out, parted):
    sizes, line = fit(offer(held_out))
    assert (sizes.num_validation, sizes.num_identities) == parted
    assert sizes.num_candidates == 6 and sizes.num_views == 2
    assert line.startswith("sizes that fit faces: num_identities")
    assert "num_candidates 6 instead of 32" in line and "num_views 2 instead of 8" in line


def test_what_was_given_stays_and_the_rest_makes_room():
    sizes, _ = fit(offer(4), given=["num_identities"], num_identities=3)
    assert (sizes.num_validation, sizes.num_identities) == (1, 3)
    sizes, _ = fit(offer(4), given=["num_identities"], num_identities=4)
    assert (sizes.num_validation, sizes.num_identities) == (0, 4)
    sizes, _ = fit(offer(4), given=["num_validation"], num_validation=3)
    assert (sizes.num_validation, sizes.num_identities) == (3, 1)
    sizes, _ = fit(offer(4), given=["num_views"], num_views=5)
    assert sizes.num_views == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_identities": 5}, r"--config\.evaluate\.num_identities: got 5, but faces has 4"),
        ({"num_identities": 3, "num_validation": 2}, "num_identities: got 3, but faces has 2"),
        ({"num_validation": 4}, "num_validation: got 4, but faces has 3 subjects"),
        ({"num_candidates": 7}, "num_candidates: got 7, but faces has 6 subjects"),
        ({"num_views": 6}, "num_views: got 6, but faces has 5 pictures of a subject"),
    ],
)
def test_what_was_given_and_is_not_there_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        fit(offer(4), given=given, **given)


def test_somebody_must_be_told_apart():
    with pytest.raises(UserError, match="faces: has 1 subject that can be judged"):
        fit(offer(1, 1, (3,)))


def test_drawn_worlds_have_splits():
    sizes, line = fitting_splits(USUAL, frozenset(), "fonts", 10, 40)
    assert (sizes.num_validation, sizes.num_identities, sizes.num_candidates) == (10, 40, 10)
    assert sizes.num_views == 8 and "num_identities 40 instead of 64" in line
    with pytest.raises(UserError, match="num_identities: got 64, but fonts has 40 held-out"):
        fitting_splits(USUAL, frozenset({"evaluate.num_identities"}), "fonts", 10, 40)


@pytest.mark.parametrize(
    ("name", "value"), [("num_identities", 0), ("num_validation", -1), ("num_candidates", 1)]
)
def test_numbers_that_cannot_be(name, value):
    section = {**dataclasses.asdict(USUAL), name: value}
    with pytest.raises(UserError, match=f"--config.evaluate.{name}: got {value}, expected"):
        asked_sizes(section)
