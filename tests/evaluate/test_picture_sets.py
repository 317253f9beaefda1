import dataclasses

import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.picture_sets import (
    Sizes,
    held_out,
    in_order,
    make_picture_sets,
    parted,
)
from hyperlora_jax.evaluate.sample_cache import cache_key
from hyperlora_jax.pictures import pictures
from hyperlora_jax.pictures.subjects import Subject

SIZES = Sizes(
    num_identities=3, num_validation=2, num_captions=4, num_views=2, num_candidates=4
)  # fmt: skip


def subject(name, count=5, identity="", **changes):
    random = np.random.default_rng(list(name.encode()))
    drawn = random.integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    files = tuple(pictures.encode_png(picture) for picture in drawn)
    captions = tuple(f"{name} {k}" for k in range(count))
    given = {"references": files, "targets": files, "captions": captions, **changes}
    return Subject(name, identity or name, **given)


PEOPLE = [subject(name) for name in ("anna", "bert", "carl", "dora", "emil", "fred", "gina")]


def sets(people=PEOPLE, split_seed=0, training_ids=frozenset(), sizes=SIZES, **asked):
    ordered = in_order(held_out(people, training_ids), split_seed)
    return make_picture_sets(ordered, sizes, training_ids=training_ids, **asked)


def test_methods_never_see_what_judges_compare_with():
    validation, test = sets(training_ids=frozenset({"anna"}))
    names = [[p.id for p in asked.identities] for asked in (validation, test)]
    assert [len(own) for own in names] == [2, 3]
    assert not set(names[0]) & set(names[1]) and "anna" not in names[0] + names[1]
    assert [own.shape for own in test.views] == [(2, 4, 4, 3)] * 3
    assert [own.shape for own in test.gallery] == [(3, 4, 4, 3)] * 5
    for i, person in enumerate(test.identities):
        for kind, which in ((test.views[i], (0, 1)), (test.gallery[i], (2, 3, 4))):
            expected = [pictures.decode(person.targets[k]) for k in which]
            np.testing.assert_array_equal(kind, expected)
        own = [f"{person.id} {k}" for k in (2, 3, 4, 2)]
        assert list(test.captions[i]) == own
        assert list(test.view_captions[i]) == [f"{person.id} 0", f"{person.id} 1"]
    np.testing.assert_array_equal(test.others[1, 3], test.gallery[1][0] / np.float32(255))
    assert (test.candidates[:, 0] == [0, 1, 2]).all()
    assert all(len(set(row)) == 4 for row in test.candidates)
    assert test.facts["pictures_judged_by"] == [3, 3, 3] and test.facts["checked_against"] == 1


def test_everybody_keeps_a_number_of_pictures_of_their_own():
    people = [subject(f"p{count}", count) for count in (2, 3, 6, 9)]
    every = dataclasses.replace(SIZES, num_identities=4, num_validation=0)
    validation, test = make_picture_sets(people, every)
    assert validation is None
    assert [len(own) for own in test.views] == [1, 2, 2, 2]
    assert [len(own) for own in test.gallery] == [1, 1, 4, 7]
    assert test.facts["pictures_shown"] == [1, 2, 2, 2]
    assert test.references.shape == (4, 4, 4, 3) and test.others.shape == (4, 4, 4, 4, 3)
    np.testing.assert_array_equal(test.others[0, 0], test.others[0, 3])
    swapped = test.select([2, 0])
    assert [len(own) for own in swapped.gallery] == [4, 1, 1, 7]
    assert [len(own) for own in swapped.views] == [2, 1]
    # Shapes differ now, so what was drawn for other pictures must not be found again.
    other = make_picture_sets(people[::-1], every)[1]
    assert cache_key("f", other, 1.0) != cache_key("f", test, 1.0)


def test_a_single_picture_leaves_nothing_to_judge_by():
    assert parted(subject("anna", 1), 8)[1] == ()
    anna = subject("anna", 3)
    views, others = parted(anna, 8)
    assert views == anna.targets[:2] and others == anna.targets[2:]
    # A picture that is there twice is not kept from the methods.
    twice = (anna.targets[0], anna.targets[0])
    assert (
        parted(dataclasses.replace(anna, references=twice, targets=twice, captions=("", "")), 8)[1]
        == ()
    )


def test_the_encoder_is_shown_pictures_of_its_own_size():
    shown = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    _, test = sets(seen=lambda name, count: np.stack([shown + len(name) + k for k in range(count)]))
    np.testing.assert_array_equal(test.seen_references[0], (shown + 4) / np.float32(255))
    assert test.first(2).seen_references.shape == (2, 2, 2, 3)
    second = test.first(2).first_views(2)[1]
    np.testing.assert_array_equal(second[1], (shown + 5) / np.float32(255))
    _, plain = sets()
    np.testing.assert_array_equal(plain.seen_references, plain.references)


def test_others_to_tell_apart_may_have_been_trained_on():
    sizes = Sizes(num_identities=1, num_validation=0, num_captions=2, num_views=2, num_candidates=3)
    _, test = make_picture_sets(
        PEOPLE[:1], sizes, training_ids=frozenset({"bert", "carl"}), strangers=PEOPLE[1:3]
    )
    assert len(test.gallery) == 3 and sorted(test.candidates[0]) == [0, 1, 2]


def test_draws_depend_on_the_seeds_alone():
    first, again = (sets()[1] for _ in range(2))
    np.testing.assert_array_equal(first.noise((2,)), again.noise((2,)))
    other = sets(identity_seed=1)[1]
    assert [p.id for p in other.identities] == [p.id for p in first.identities]
    assert (other.noise_seeds != first.noise_seeds).all()
    names = {tuple(p.id for p in sets(split_seed=k)[1].identities) for k in range(4)}
    assert len(names) > 1
    np.testing.assert_array_equal(first.first(2).noise((2,)), first.noise((2,))[:2])
    np.testing.assert_array_equal(first.first(2).gallery, first.gallery)
    swapped = first.select([2, 0])
    assert swapped.identities == (first.identities[2], first.identities[0])
    gallery, others = np.stack(first.gallery), np.stack(swapped.gallery)
    np.testing.assert_array_equal(others[:2], gallery[[2, 0]])
    np.testing.assert_array_equal(others[swapped.candidates], gallery[first.candidates[[2, 0]]])


def test_prompts_are_tried_in_turn():
    test = sets(prompts=("a hat", "a coat"))[1]
    assert set(test.captions) == {("a hat", "a coat", "a hat", "a coat")}


def test_metadata_says_what_may_be_shown():
    anna = PEOPLE[0]
    roles = subject("anna", references=anna.references[3:], targets=anna.targets[:4],
                    captions=anna.captions[:4])  # fmt: skip
    views, others = parted(roles, 8)
    assert views == anna.references[3:] and others == anna.targets[:3]
    only = dataclasses.replace(roles, references=anna.references[4:])
    assert parted(only, 8) == (anna.references[4:], anna.targets[:4])


def test_another_name_of_a_trained_identity_is_no_newcomer():
    twice = [*PEOPLE, subject("anna at work", identity="anna"), subject("b2", identity="bert")]
    free = [s.id for s in held_out(twice, frozenset({"anna"}))]
    assert free == ["bert", "carl", "dora", "emil", "fred", "gina"]
    assert [s.id for s in held_out(twice, frozenset({"anna at work"}))] == free


def test_somebody_who_was_trained_on_is_refused():
    with pytest.raises(UserError, match="1 of 7 identities were trained on"):
        make_picture_sets(PEOPLE, SIZES, training_ids=frozenset({"emil"}))
