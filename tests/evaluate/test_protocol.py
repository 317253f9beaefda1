import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.protocol import check_disjoint, make_evaluation_set, training_ids

SMALL = {"num_captions": 1, "num_views": 1, "num_pooled_captions": 2, "progress": False}


def test_answers_are_exact_renders(avatars, test_set):
    assert test_set.exact.shape == (6, 3, 16, 16, 3)
    person = test_set.identities[4]
    drawn = [avatars.render(person, view) / 255.0 for view in avatars.views("test", 4)]
    for picture in test_set.exact[4]:
        assert min(np.abs(picture - d).max() for d in drawn) < 1e-6
    np.testing.assert_allclose(test_set.candidate_renders(4)[:, 0], test_set.exact[4])
    assert len(set(test_set.candidates[4])) == 5


def test_captions_match_labels(test_set):
    for text, labels in zip(test_set.captions[2], test_set.caption_labels[2], strict=True):
        names = [test_set.parts[p][k] for p, k in zip(test_set.parts, labels, strict=True)]
        assert all(name in text for name in names)


def test_everybody_is_held_out(avatars, test_set, validation_set):
    for split, own in (("test", test_set), ("validation", validation_set)):
        everybody = {avatars.identity(split, k) for k in range(avatars.num_identities(split))}
        assert everybody >= set(own.identities)
    trained = training_ids(avatars, 0, 500)
    check_disjoint(test_set.identities, trained)
    with pytest.raises(UserError, match="1 of 2 identities were trained on"):
        check_disjoint([test_set.identities[0], avatars.identity("train", 3)], trained)


def test_seeds(avatars, test_set):
    again = make_evaluation_set(avatars, num_identities=2, num_candidates=2, **SMALL)
    same = make_evaluation_set(avatars, num_identities=2, num_candidates=2, **SMALL)
    np.testing.assert_array_equal(again.noise((2, 2)), same.noise((2, 2)))
    assert again.identities == same.identities
    other = make_evaluation_set(
        avatars, num_identities=2, num_candidates=2, identity_seed=1, **SMALL
    )
    assert other.identities != again.identities and other.captions != again.captions
    noise = test_set.noise((4, 4, 2))
    assert noise.shape == (6, 3, 4, 4, 2) and 0.8 < noise.std() < 1.2


def test_first_keeps_the_questions(test_set):
    two = test_set.first(2)
    np.testing.assert_array_equal(two.exact, test_set.exact[:2])
    np.testing.assert_array_equal(two.candidate_renders(1), test_set.candidate_renders(1))
    np.testing.assert_array_equal(two.noise((3,)), test_set.noise((3,))[:2])


def test_any_identities_keep_their_questions_and_answers(test_set):
    some = test_set.select([4, 1])
    assert some.identities == (test_set.identities[4], test_set.identities[1])
    np.testing.assert_array_equal(some.exact, test_set.exact[[4, 1]])
    assert (test_set.exact[4] != test_set.exact[1]).any()
    for k, number in enumerate((4, 1)):
        np.testing.assert_array_equal(some.candidate_renders(k), test_set.candidate_renders(number))
        np.testing.assert_array_equal(some.noise((3,))[k], test_set.noise((3,))[number])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_identities": 10**6}, "evaluate.num_identities: found"),
        ({"num_identities": 2, "num_candidates": 1}, "evaluate.num_candidates: found 1"),
        ({"num_identities": 2, "num_candidates": 2, "num_captions": 3}, "expected 1 to 2"),
    ],
)
def test_refused(avatars, change, message):
    with pytest.raises(UserError, match=message):
        make_evaluation_set(avatars, **{**SMALL, **change})


def test_training_split_is_no_evaluation(avatars):
    with pytest.raises(ValueError, match="must be held out"):
        make_evaluation_set(avatars, split="train", **SMALL)
