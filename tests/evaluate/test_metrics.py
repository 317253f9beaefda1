import numpy as np
import pytest

from hyperlora_jax.evaluate import metrics

RANDOM = np.random.default_rng(0)
EXACT = RANDOM.random((6, 4, 5, 8, 8, 3)).astype(np.float32)  # identities, captions, candidates


def top1(generated, candidates):
    return metrics.nearest_candidates(generated, candidates)[0]


def test_exact_render_scores_all():
    np.testing.assert_array_equal(top1(EXACT[:, :, 0], EXACT), 1.0)
    np.testing.assert_array_equal(metrics.image_error(EXACT[:, :, 0], EXACT[:, :, 0]), 0.0)
    np.testing.assert_allclose(metrics.diversity(EXACT[:, :, 0], EXACT[:, :, 0]), 1.0)


def test_another_identity_scores_nothing():
    np.testing.assert_array_equal(top1(EXACT[:, :, 3], EXACT), 0.0)


def test_noise_scores_chance():
    noise = RANDOM.random((200, 4, 8, 8, 3))
    candidates = RANDOM.random((200, 4, 5, 8, 8, 3))
    estimate = metrics.clustered_mean(top1(noise, candidates))
    assert abs(estimate.mean - 0.2) < 4 * estimate.stderr < 0.12


def test_duplicate_candidates_share_the_point():
    candidates = np.repeat(EXACT[:, :, :1], 5, axis=2)
    np.testing.assert_allclose(top1(EXACT[:, :, 0], candidates), 0.2)


def test_failures_count_as_wrong():
    broken = EXACT[:, :, 0].copy()
    broken[2, 1, 4, 4, 0] = np.nan
    assert top1(broken, EXACT)[2, 1] == 0.0
    assert top1(broken, EXACT).sum() == 23
    assert metrics.image_error(broken, EXACT[:, :, 0])[2, 1] == metrics.WORST_ERROR
    labels = np.zeros((6, 4, 2), int)
    accuracy = metrics.caption_accuracy(labels, labels, metrics.is_finite(broken))
    assert accuracy[2, 1].tolist() == [0.0, 0.0] and accuracy.sum() == 46
    assert np.isfinite(metrics.diversity(broken, EXACT[:, :, 0])).all()


def test_pixels_are_clipped():
    exact = np.ones((1, 1, 2, 2, 3), np.float32)
    np.testing.assert_allclose(metrics.image_error(exact * 9.0, exact), 0.0)
    np.testing.assert_allclose(metrics.image_error(exact * 0.9, exact), 0.01, rtol=1e-5)


def test_frozen_method_has_no_diversity():
    frozen = np.repeat(EXACT[:, :1, 0], 4, axis=1)
    np.testing.assert_allclose(metrics.diversity(frozen, EXACT[:, :, 0]), 0.0, atol=1e-9)


def test_clustered_mean_counts_identities_not_pictures():
    scores = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    estimate = metrics.clustered_mean(scores)
    assert estimate.n == 3 and estimate.mean == 0.5
    assert estimate.stderr == pytest.approx(0.5 / np.sqrt(3))
    repeated = metrics.clustered_mean(np.repeat(scores, 50, axis=1))
    assert repeated.stderr == pytest.approx(estimate.stderr)
    assert metrics.clustered_mean(scores[:1]).to_json() == {"mean": 1.0, "stderr": None, "n": 1}


def test_pairing_removes_what_identities_share():
    hard = RANDOM.random(40)
    first, second = hard + 0.1 + 0.01 * RANDOM.random(40), hard
    paired = metrics.paired_difference(first, second)
    assert paired.mean == pytest.approx(0.105, abs=0.005)
    assert paired.stderr < 0.05 * metrics.clustered_mean(first).stderr


def test_ratio_agrees_with_the_bootstrap():
    truth = RANDOM.random((64, 1))
    first = (RANDOM.random((64, 8)) < 0.3 + 0.5 * truth).astype(float)
    second = (RANDOM.random((64, 8)) < 0.5 + 0.5 * truth).astype(float)
    estimate = metrics.paired_ratio(first, second)
    rows = RANDOM.integers(64, size=(4000, 64))
    a, b = first.mean(axis=1)[rows].mean(axis=1), second.mean(axis=1)[rows].mean(axis=1)
    assert estimate.mean == pytest.approx(first.mean() / second.mean())
    assert estimate.stderr == pytest.approx((a / b).std(), rel=0.1)
    assert np.isnan(metrics.paired_ratio(first, np.zeros_like(second)).mean)
    assert metrics.paired_ratio(first, first).stderr == pytest.approx(0.0, abs=1e-12)


def test_permutation_test():
    noise = RANDOM.standard_normal((30, 4))
    assert metrics.sign_flip_p_value(noise + 1.0, np.zeros((30, 4))) < 0.001
    values = [
        metrics.sign_flip_p_value(RANDOM.standard_normal(20), np.zeros(20), 500) for _ in range(60)
    ]
    assert 0.3 < np.mean(values) < 0.7


def test_misuse():
    with pytest.raises(ValueError, match="not the same identities"):
        metrics.paired_difference(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="at least one identity"):
        metrics.clustered_mean(np.zeros((0, 3)))
