import numpy as np
import pytest

from hyperlora_jax.data import pictures
from hyperlora_jax.data.subjects import Subject
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.picture_sets import held_out, make_picture_sets

SIZES = {
    "num_identities": 3, "num_validation": 2, "num_captions": 4, "num_views": 2,
    "num_candidates": 4,
}  # fmt: skip


def subject(name, count=5, identity="", **changes):
    random = np.random.default_rng(list(name.encode()))
    drawn = random.integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    files = tuple(pictures.encode_png(picture) for picture in drawn)
    captions = tuple(f"{name} {k}" for k in range(count))
    given = {"references": files, "targets": files, "captions": captions, **changes}
    return Subject(name, identity or name, **given)


PEOPLE = [subject(name) for name in ("anna", "bert", "carl", "dora", "emil", "fred", "gina")]


def test_methods_never_see_what_judges_compare_with():
    validation, test = make_picture_sets(PEOPLE, "faces", training_ids=frozenset({"anna"}), **SIZES)
    names = [[p.id for p in asked.identities] for asked in (validation, test)]
    assert [len(own) for own in names] == [2, 3]
    assert not set(names[0]) & set(names[1]) and "anna" not in names[0] + names[1]
    assert test.views.shape == (3, 2, 4, 4, 3) and test.gallery.shape == (5, 3, 4, 4, 3)
    for i, person in enumerate(test.identities):
        for kind, which in ((test.views[i], (0, 1)), (test.gallery[i], (2, 3, 4))):
            expected = [pictures.decode(person.targets[k]) for k in which]
            np.testing.assert_array_equal(kind, expected)
        own = [f"{person.id} {k}" for k in (2, 3, 4, 2)]
        assert list(test.captions[i]) == own
        assert list(test.view_captions[i]) == [f"{person.id} 0", f"{person.id} 1"]
    np.testing.assert_array_equal(test.others[1, 3], test.gallery[1, 0] / np.float32(255))
    assert (test.candidates[:, 0] == [0, 1, 2]).all()
    assert all(len(set(row)) == 4 for row in test.candidates)
    assert test.facts["num_gallery"] == 3 and test.facts["checked_against"] == 1


def test_draws_depend_on_the_seeds_alone():
    first, again = (make_picture_sets(PEOPLE, "faces", **SIZES)[1] for _ in range(2))
    np.testing.assert_array_equal(first.noise((2,)), again.noise((2,)))
    other = make_picture_sets(PEOPLE, "faces", identity_seed=1, **SIZES)[1]
    assert [p.id for p in other.identities] == [p.id for p in first.identities]
    assert (other.noise_seeds != first.noise_seeds).all()
    names = {
        tuple(p.id for p in make_picture_sets(PEOPLE, "faces", split_seed=k, **SIZES)[1].identities)
        for k in range(4)
    }
    assert len(names) > 1
    np.testing.assert_array_equal(first.first(2).noise((2,)), first.noise((2,))[:2])
    np.testing.assert_array_equal(first.first(2).gallery, first.gallery)
    swapped = first.select([2, 0])
    assert swapped.identities == (first.identities[2], first.identities[0])
    np.testing.assert_array_equal(swapped.gallery[:2], first.gallery[[2, 0]])
    kept = swapped.gallery[swapped.candidates]
    np.testing.assert_array_equal(kept, first.gallery[first.candidates[[2, 0]]])


def test_prompts_are_tried_in_turn():
    test = make_picture_sets(PEOPLE, "faces", prompts=("a hat", "a coat"), **SIZES)[1]
    assert set(test.captions) == {("a hat", "a coat", "a hat", "a coat")}


def test_metadata_says_what_may_be_shown():
    anna = PEOPLE[0]
    roles = subject("anna", references=anna.references[3:])
    _, test = make_picture_sets(
        [roles, subject("bert")], "faces",
        **{**SIZES, "num_identities": 1, "num_validation": 1, "num_candidates": 2}
    )  # fmt: skip
    every = {p.id: p for p in test.identities}
    if "anna" in every:
        np.testing.assert_array_equal(test.views[0, 0], pictures.decode(anna.targets[3]))


def test_another_name_of_a_trained_identity_is_no_newcomer():
    twice = [*PEOPLE, subject("anna at work", identity="anna"), subject("b2", identity="bert")]
    free = [s.id for s in held_out(twice, frozenset({"anna"}))]
    assert free == ["bert", "carl", "dora", "emil", "fred", "gina"]
    assert [s.id for s in held_out(twice, frozenset({"anna at work"}))] == free


@pytest.mark.parametrize(
    ("people", "change", "message"),
    [
        (PEOPLE[:4], {}, r"faces: found 4 identities .* expected 5"),
        (PEOPLE, {"num_candidates": 6}, "found 6, expected 2 to the 5 subjects"),
        (PEOPLE, {"num_validation": 0}, "num_validation 0, at least 1"),
        ([*PEOPLE[:4], subject("zoe", 2)], {}, "faces/zoe: has too few pictures"),
    ],
)
def test_refused(people, change, message):
    with pytest.raises(UserError, match=message):
        make_picture_sets(people, "faces", **{**SIZES, **change})
