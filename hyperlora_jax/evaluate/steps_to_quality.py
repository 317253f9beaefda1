"""How many fitting steps does a starting point save?

Every initialisation (zero, mean, nearest, hypernetwork) is fitted on by the same recipe and scored
at the same checkpoints. The headline: the first number of steps, and its seconds, at which the
mean score reaches 95 % of the full conventional LoRA's (zero initialisation, all steps).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hyperlora_jax.array_types import AnyArray, Float, Params
from hyperlora_jax.evaluate.metrics import Estimate, clustered_mean, paired_ratio

CHECKPOINTS = (0, 5, 10, 25, 50, 100, 200, 400, 800)
TARGET = 0.95

# (LoRAs [l], steps already done, steps to reach) -> (LoRAs, seconds that it took)
Advance = Callable[[Any, int, int], tuple[Any, float]]
# LoRAs [l] -> {score: [l, ...]}, more is better for identity_top1, less for image_error and loss
Score = Callable[[Any], Mapping[str, AnyArray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Scores of one initialisation along its fit.

    Attributes:
      steps: checkpoints, ascending, from 0.
      seconds: [k] time to get there, for all LoRAs together, without compilation and scoring.
      scores: {score: per checkpoint an array [l, ...]}.
    """

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    scores: Mapping[str, Sequence[np.ndarray]]

    def estimates(self, score: str) -> list[Estimate]:
        """Mean ± standard error at every checkpoint."""
        return [clustered_mean(values) for values in self.scores[score]]


@dataclasses.dataclass(frozen=True)
class Headline:
    """When an initialisation reaches the target.

    Attributes:
      steps: first checkpoint at or above the target; None if it never gets there.
      seconds_per_lora: time to it per LoRA (amortised over the batch), start included.
      relative: score there (or at the end) ÷ the full conventional LoRA's, paired.
    """

    steps: int | None
    seconds_per_lora: float | None
    relative: Estimate

    def to_json(self) -> dict[str, Any]:
        """{"steps", "seconds_per_lora", "relative": {"mean", "stderr", "n"}}."""
        return {**dataclasses.asdict(self), "relative": self.relative.to_json()}


def run_curve(
    start: Params,
    advance: Advance,
    score: Score,
    checkpoints: Sequence[int] = CHECKPOINTS,
    start_seconds: float = 0.0,
) -> Curve:
    """Fits on from `start` and scores at every checkpoint.

    Args:
      start: LoRA tree with leading axis l.
      advance: fits all LoRAs from one step count to another; told the first, so that the
        optimiser's schedule can be the uninterrupted one's.
      score: scores of the LoRAs, an array per identity.
      checkpoints: ascending numbers of steps; the first must be 0.
      start_seconds: what it took to make `start` (generation, search).

    Raises:
      ValueError: checkpoints that do not ascend from 0.
    """
    ascending = all(a < b for a, b in itertools.pairwise(checkpoints))
    if not checkpoints or checkpoints[0] != 0 or not ascending:
        raise ValueError(f"checkpoints must ascend from 0. Got: {checkpoints=}")
    loras, done, seconds = start, 0, [start_seconds]
    found = [dict(score(loras))]
    for steps in checkpoints[1:]:
        loras, took = advance(loras, done, steps)
        done = steps
        seconds.append(seconds[-1] + took)
        found.append(dict(score(loras)))
    scores = {name: [np.asarray(row[name]) for row in found] for name in found[0]}
    return Curve(tuple(checkpoints), tuple(seconds), scores)


def headlines(
    curves: Mapping[str, Curve],
    full: Float[AnyArray, "l *rest"],
    score: str = "identity_top1",
    target: float = TARGET,
) -> dict[str, Headline]:
    """Steps and seconds to `target` of the full conventional LoRA, for every initialisation.

    Args:
      curves: {initialisation: curve}.
      full: scores of the full conventional LoRA on the same identities.
      score: a score where more is better.
      target: share of the full score to reach.
    """
    wanted = target * clustered_mean(full).mean
    found = {}
    for name, curve in curves.items():
        means = [estimate.mean for estimate in curve.estimates(score)]
        at = next((k for k, mean in enumerate(means) if mean >= wanted), None)
        where = len(means) - 1 if at is None else at
        relative = paired_ratio(curve.scores[score][where], full)
        count = len(curve.scores[score][where])
        found[name] = Headline(
            None if at is None else curve.steps[at],
            None if at is None else curve.seconds[at] / count,
            relative,
        )
    return found


def to_json(curves: Mapping[str, Curve], found: Mapping[str, Headline]) -> dict[str, Any]:
    """Curves and headlines for metrics.json."""
    return {
        "headline": {name: headline.to_json() for name, headline in found.items()},
        "curves": {
            name: {
                "steps": list(curve.steps),
                "seconds": list(curve.seconds),
                **{s: [e.to_json() for e in curve.estimates(s)] for s in curve.scores},
            }
            for name, curve in curves.items()
        },
    }


def chart_series(
    curves: Mapping[str, Curve], score: str = "identity_top1"
) -> dict[str, tuple[list[int], list[float]]]:
    """{initialisation: (steps, means)}, as `figures.line_chart` takes it."""
    return {
        name: (list(curve.steps), [estimate.mean for estimate in curve.estimates(score)])
        for name, curve in curves.items()
    }
