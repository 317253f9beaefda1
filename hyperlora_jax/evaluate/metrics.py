"""Scores of generated pictures against exact renders, and their statistics.

Scores are arrays per identity and caption [i, c]. A picture that is not finite is a failure, and a
failure is never left out: it has the largest error, no identity and no caption part right.

Statistics treat the identity as the unit: pictures of one identity are not independent, so the
mean over an identity's pictures is one observation, and with n identities

  1. mean m = sum_k x_k / n, standard error s / sqrt(n), s^2 = sum_k (x_k - m)^2 / (n - 1)
                                                                              `clustered_mean`
  2. paired difference: (1) of x_k - y_k                                      `paired_difference`
  3. ratio r = mean(x) / mean(y), standard error by the delta method:
     that of (x_k - r y_k) divided by mean(y)                                 `paired_ratio`
"""

import dataclasses

import numpy as np

from hyperlora_jax.array_types import AnyArray, Bool, Float, Int

WORST_ERROR = 1.0  # mean squared error of a failure: black for white


@dataclasses.dataclass(frozen=True)
class Estimate:
    """mean ± stderr over n identities; stderr is NaN for n = 1."""

    mean: float
    stderr: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """{"mean", "stderr", "n"}; an undefined standard error becomes null."""
        stderr = None if np.isnan(self.stderr) else self.stderr
        return {"mean": self.mean, "stderr": stderr, "n": self.n}


def is_finite(images: Float[AnyArray, "*batch h w 3"]) -> Bool[np.ndarray, "*batch"]:
    """Which pictures are finite in every pixel."""
    return np.asarray(np.isfinite(np.asarray(images)).all(axis=(-3, -2, -1)))


def image_error(
    generated: Float[AnyArray, "i c h w 3"], exact: Float[AnyArray, "i c h w 3"]
) -> Float[np.ndarray, "i c"]:
    """Mean squared error to the exact render, pixels in [0, 1] (clipped); failures score 1."""
    pixels = np.asarray(generated, np.float32)
    squared = np.square(np.clip(pixels, 0.0, 1.0) - np.asarray(exact))
    error = squared.mean(axis=(-3, -2, -1), dtype=np.float64)
    return np.where(is_finite(pixels), error, WORST_ERROR)


def nearest_candidates(
    generated: Float[AnyArray, "i c h w 3"],
    candidates: Float[AnyArray, "i c n h w 3"],
) -> tuple[Float[np.ndarray, "i c"], Int[np.ndarray, "i c"]]:
    """(whether the nearest of n exact renders (mean squared error) is the true identity's, number
    of the nearest).

    Candidates at exactly the same distance share the point, so that a duplicate render is worth
    what guessing between the duplicates is worth. Failures score 0, and count as black.

    Args:
      generated: pictures of i identities under c captions each.
      candidates: exact renders of n identities under the same caption, the true one first.
    """
    usable = is_finite(generated)
    score, column = np.zeros(usable.shape), np.zeros(usable.shape, np.int64)
    for i, c in np.ndindex(*usable.shape):
        picture = np.nan_to_num(np.asarray(generated[i, c], np.float32), posinf=0.0, neginf=0.0)
        difference = np.clip(picture, 0.0, 1.0) - np.asarray(candidates[i, c])
        distance = np.square(difference).mean(axis=(1, 2, 3), dtype=np.float64)
        nearest = distance == distance.min()
        column[i, c] = distance.argmin()
        score[i, c] = usable[i, c] * nearest[0] / nearest.sum()
    return score, column


def caption_accuracy(
    predicted: Int[AnyArray, "i c q"],
    labels: Int[AnyArray, "i c q"],
    finite: Bool[AnyArray, "i c"],
) -> Float[np.ndarray, "i c q"]:
    """1.0 where the probe sees the caption's class, per caption part; failures score 0.

    The mean over the last axis is the caption accuracy, its minimum is "all parts right".
    """
    right = np.asarray(predicted) == np.asarray(labels)
    return (right & np.asarray(finite)[..., None]).astype(np.float64)


def diversity(
    generated: Float[AnyArray, "i c h w 3"], exact: Float[AnyArray, "i g h w 3"]
) -> Float[np.ndarray, " i"]:
    """Variance over captions, relative to the exact renders' (1 = as diverse, 0 = frozen).

    Pixels are clipped to [0, 1]; failures count as black.
    """
    pixels = np.nan_to_num(np.asarray(generated, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    ours = np.clip(pixels, 0.0, 1.0).var(axis=1).mean(axis=(1, 2, 3))
    theirs = np.asarray(exact, np.float32).var(axis=1).mean(axis=(1, 2, 3))
    return np.float64(ours) / np.maximum(np.float64(theirs), 1e-12)


def clustered_mean(scores: Float[AnyArray, "i *rest"]) -> Estimate:
    """Mean ± standard error, clustered by the first axis; equation 1 of the module."""
    values = _per_identity(scores)
    spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Estimate(float(values.mean()), float(spread), len(values))


def paired_difference(
    first: Float[AnyArray, "i *rest"], second: Float[AnyArray, "..."]
) -> Estimate:
    """Mean ± standard error of first - second on the same identities; equation 2."""
    return clustered_mean(_per_identity(first) - _same_length(first, second))


def paired_ratio(first: Float[AnyArray, "i *rest"], second: Float[AnyArray, "..."]) -> Estimate:
    """Ratio of the means ± delta-method standard error; equation 3. NaN when mean(second) = 0."""
    numerator, denominator = _per_identity(first), _same_length(first, second)
    if denominator.mean() == 0.0:
        return Estimate(float("nan"), float("nan"), len(numerator))
    ratio = float(numerator.mean() / denominator.mean())
    residual = clustered_mean(numerator - ratio * denominator)
    return Estimate(ratio, residual.stderr / abs(float(denominator.mean())), residual.n)


def sign_flip_p_value(
    first: Float[AnyArray, "i *rest"],
    second: Float[AnyArray, "..."],
    num_draws: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided paired permutation test: P(|mean difference| is as large when signs are random).

    At least 1 / (num_draws + 1) by construction.
    """
    difference = _per_identity(first) - _same_length(first, second)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (num_draws, len(difference)))
    as_large = np.abs(signs @ difference) >= np.abs(difference.sum()) - 1e-12
    return float((as_large.sum() + 1) / (num_draws + 1))


def _per_identity(scores: AnyArray) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if not len(values):
        raise ValueError(f"expected scores of at least one identity. Got: {values.shape=}")
    return values.reshape(len(values), -1).mean(axis=1)


def _same_length(first: AnyArray, second: AnyArray) -> np.ndarray:
    if len(first) != len(second):
        raise ValueError(f"not the same identities. Got: {len(first)=} and {len(second)=}")
    return _per_identity(second)
