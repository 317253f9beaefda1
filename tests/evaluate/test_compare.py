import numpy as np
import pytest

from hyperlora_jax.evaluate import compare
from hyperlora_jax.evaluate.compare import Method, Scores
from hyperlora_jax.evaluate.sample_cache import SampleCache


def blend(weight):
    """Pictures between the mean candidate (0) and the exact answer (1)."""

    def sample(questions, strength):
        mean = np.stack(
            [questions.candidate_renders(i).mean(axis=1) for i in range(questions.num_identities)]
        )
        share = weight * (1.0 - abs(strength - 1.5))
        return share * questions.exact + (1.0 - share) * mean

    return sample


@pytest.fixture(scope="module")
def results(test_set, validation_set, probe):
    methods = [
        Method("generated", blend(0.9), strengths=(1.0, 1.5, 2.0)),
        Method("shuffled", lambda q, s: np.roll(q.exact, 1, axis=0)),
        Method("conventional", lambda q, s: blend(0.95)(q, 1.5)[:3]),
        Method("broken", lambda q, s: np.full_like(q.exact, np.nan)),
    ]
    return compare.compare(methods, validation_set, test_set, compare.scorer(probe))


def test_exact_scores_all(results):
    scores = results["exact"].scores
    assert scores.top1.min() == scores.caption.min() == 1.0
    assert scores.error.max() == 0.0 and scores.num_failures == 0


def test_another_identity_scores_no_identity(results):
    scores = results["shuffled"].scores
    assert scores.top1.max() == 0.0 and scores.error.min() > 0.0


def test_strangers_score_chance(test_set, probe):
    """Everyone drawn as candidate k, over all k: right exactly once in n."""
    drawn = np.stack([test_set.candidate_renders(i) for i in range(6)])  # [i, c, n, ...]
    found = [compare.score(test_set, drawn[:, :, k], probe) for k in range(drawn.shape[2])]
    assert np.mean([scores.top1.mean() for scores in found]) == pytest.approx(1 / 5)
    for k, scores in enumerate(found):
        np.testing.assert_array_equal(scores.taken_for, test_set.candidates[:, [k] * 3])


def test_a_copied_reference_is_flagged(results):
    scores = results["copy_reference"].scores
    assert scores.caption.mean() < 0.3  # it shows its own view, not the caption's
    assert scores.error.mean() > 5 * results["generated"].scores.error.mean()
    np.testing.assert_allclose(scores.diversity, 0.0, atol=1e-9)


def test_failures_are_wrong_never_missing(results):
    scores = results["broken"].scores
    assert scores.num_failures == 18 and scores.top1.shape == (6, 3)
    assert scores.top1.max() == scores.caption.max() == 0.0 and scores.error.min() == 1.0


def test_strength_is_chosen_on_validation(results):
    assert results["generated"].strength == 1.5
    assert set(results["generated"].curve) == {1.0, 1.5, 2.0}
    assert results["generated"].curve[1.5].top1.shape == (3, 2)
    assert results["shuffled"].curve == {}


def test_slow_methods_may_do_fewer_identities(results):
    assert results["conventional"].scores.top1.shape == (3, 3)


def scores_of(top1, error):
    ones = np.ones((1, 1))
    return Scores(
        top1 * ones, error * ones, np.ones((1, 1, 1)), np.ones(1), 0, np.zeros((1, 1), int)
    )


def test_choice_prefers_identity_then_error():
    curve = {1.0: scores_of(0.5, 0.01), 2.0: scores_of(0.6, 0.03), 3.0: scores_of(0.595, 0.02)}
    assert compare.choose_strength(curve) == 3.0
    assert compare.choose_strength({k: curve[k] for k in (1.0, 2.0)}) == 2.0


@pytest.mark.parametrize(
    ("strengths", "chosen", "tried"),
    [
        ((0.5, 1.0), 1.5, {0.5, 1.0, 1.5, 2.25}),  # beyond the greatest, until it falls
        ((2.25, 3.0), 1.5, {1.0, 1.5, 2.25, 3.0}),  # below the least
        ((0.2, 0.3), 1.0125, {0.2, 0.3, 0.45, 0.675, 1.0125}),  # but not for ever
        ((1.0, 1.5, 2.0), 1.5, {1.0, 1.5, 2.0}),
    ],
)
def test_a_best_strength_at_the_end_of_the_grid_widens_it(
    test_set, validation_set, probe, strengths, chosen, tried
):
    method = Method("generated", blend(0.9), strengths)
    found = compare.run_method(method, validation_set, test_set, compare.scorer(probe))
    assert found.strength == chosen
    assert set(found.curve) == tried


def test_cache_samples_once(test_set, tmp_path):
    calls = []

    def sample():
        calls.append(1)
        return test_set.exact

    cache = SampleCache(tmp_path)
    first = cache.images("weights-a", test_set, 1.0, sample)
    np.testing.assert_array_equal(cache.images("weights-a", test_set, 1.0, sample), first)
    assert len(calls) == 1
    cache.images("weights-a", test_set, 2.0, sample)
    cache.images("weights-b", test_set, 1.0, sample)
    cache.images("weights-a", test_set.first(2), 1.0, lambda: sample()[:2])
    assert len(calls) == 4
    for file in tmp_path.iterdir():
        file.write_bytes(b"cut off")
    np.testing.assert_array_equal(cache.images("weights-a", test_set, 1.0, sample), first)
    assert len(calls) == 5
    cache.images("", test_set, 1.0, sample)
    cache.images("", test_set, 1.0, sample)
    assert len(calls) == 7


def test_misuse(test_set, validation_set, probe):
    with pytest.raises(ValueError, match="another shape"):
        compare.score(test_set, np.zeros((6, 2, 16, 16, 3), np.float32), probe)
    with pytest.raises(ValueError, match="expected pictures of 1 to 6"):
        compare.score(test_set, np.zeros((7, 3, 16, 16, 3), np.float32), probe)
    twice = [Method("a", blend(1.0)), Method("a", blend(1.0))]
    with pytest.raises(ValueError, match="two methods of one name"):
        compare.compare(twice, validation_set, test_set, compare.scorer(probe))


def test_guidance_is_chosen_before_strength(test_set, validation_set, probe):
    def sample(questions, strength, guidance=1.0):
        return blend(0.9 if guidance == 2.0 else 0.2)(questions, strength)

    method = Method("ridge", sample, strengths=(1.0, 1.5), guidances=(1.0, 2.0, 3.0))
    found = compare.run_method(method, validation_set, test_set, compare.scorer(probe))
    assert (found.guidance, found.strength) == (2.0, 1.5)
    assert set(found.guidance_curve) == {1.0, 2.0, 3.0}
