"""Steps to quality, run: the conventional recipe from several starting points, scored on the way.

All identities are fitted at once, one slot each, with the keys they have in a conventional fit; the
start is all that differs between curves.

The question is how many fitting steps a starting point saves. Every initialisation (zero, mean,
nearest, hypernetwork) is fitted on by the same recipe and scored at the same checkpoints. The
headline: the first number of steps, and its seconds, at which the mean score reaches 95 % of the
full conventional LoRA's (zero initialisation, all steps).
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hyperlora_jax.array_types import AnyArray, ArrayTree, Float, Params
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.fit import spread
from hyperlora_jax.distill.parametrisations import Factors
from hyperlora_jax.distill.slots import Recipe, Slots
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.fitted_sets import encode_views, loaded_slots
from hyperlora_jax.evaluate.metrics import Estimate, clustered_mean, paired_ratio
from hyperlora_jax.evaluate.protocol import Questions
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.parallel import sharding, shared_work
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser
from hyperlora_jax.stable_diffusion.model import StableDiffusion

CHECKPOINTS = (0, 5, 10, 25, 50, 100, 200, 400, 800)
TARGET = 0.95

# (LoRAs [l], steps already done, steps to reach) -> (LoRAs, seconds that it took)
Advance = Callable[[ArrayTree, int, int], tuple[ArrayTree, float]]
# LoRAs [l] -> {score: [l, ...]}, more is better for identity_top1, less for image_error and loss
Score = Callable[[ArrayTree], Mapping[str, AnyArray]]


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

    def to_json(self) -> dict[str, object]:
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
    rows = [dict(score(loras))]
    for steps in checkpoints[1:]:
        loras, took = advance(loras, done, steps)
        done = steps
        seconds.append(seconds[-1] + took)
        rows.append(dict(score(loras)))
    scores = {name: [np.asarray(row[name]) for row in rows] for name in rows[0]}
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
    lines = {}
    for name, curve in curves.items():
        means = [estimate.mean for estimate in curve.estimates(score)]
        at = next((k for k, mean in enumerate(means) if mean >= wanted), None)
        where = len(means) - 1 if at is None else at
        relative = paired_ratio(curve.scores[score][where], full)
        count = len(curve.scores[score][where])
        lines[name] = Headline(
            None if at is None else curve.steps[at],
            None if at is None else curve.seconds[at] / count,
            relative,
        )
    return lines


def to_json(curves: Mapping[str, Curve], lines: Mapping[str, Headline]) -> dict[str, object]:
    """Curves and headlines for metrics.json."""
    return {
        "headline": {name: headline.to_json() for name, headline in lines.items()},
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


# What `steps_to_quality` and the report call a curve that starts from a method's LoRAs.
NAMES = {"mean_lora": "mean", "generated": "hypernetwork"}


def quality_curves(
    sd: StableDiffusion,
    spec: LoraSpec,
    recipe: Recipe,
    questions: Questions,
    starts: Mapping[str, tuple[Params, float]],
    score: Score,
    *,
    checkpoints: Sequence[int],
    mesh: Mesh | None = None,
) -> dict[str, Curve]:
    """One curve per start.

    Args:
        sd: the base model to fit on.
        questions: the identities to fit; every one is fitted to all its views.
        starts: {name of a method: (LoRA tree with leading axis i, seconds that it took to make)};
            the recipe's own start, zero, is added to them.
        score: of LoRAs with leading axis i.
        checkpoints: steps at which to score, from 0; see `fitting_checkpoints`.
        mesh: devices of this process to share identities out over; processes share them too.
    """
    parametrisation = Factors(spec, recipe.alpha, recipe.init_seed)
    unit = math.gcd(*checkpoints)
    count = questions.num_identities
    mine = shared_work.own_rows(count, 1 if mesh is None else mesh.size)
    encoded = encode_views(sd, questions)
    loaded = loaded_slots(encoded, parametrisation, recipe, map(int, mine))
    scale = 1.0 if recipe.alpha is None else recipe.alpha / spec.max_rank

    def step(slots: Slots, unet_params: Params) -> Slots:
        slots, losses = slot_state.advance(
            slots,
            unet_params,
            denoiser=Denoiser(sd.unet, sd.schedule, recipe.min_snr_gamma),
            recipe=recipe,
            parametrisation=parametrisation,
            num_steps=unit,
        )
        jax.block_until_ready(losses)
        return slots

    def scores(slots: Slots) -> Mapping[str, AnyArray]:
        return score(factors.scale(shared_work.gathered(count, slots.params), scale))

    curves = {}
    for method, (start, seconds) in [("zero", (None, 0.0)), *starts.items()]:
        name = NAMES.get(method, method)
        params = loaded.params
        if start is not None:
            params = factors.scale(factors.index(start, mine), 1.0 / scale)
        fresh = jax.tree.map(
            jnp.array, dataclasses.replace(loaded, params=params)
        )  # a copy: steps donate it
        slots, unet_params = fresh, sd.frozen_unet
        if mesh is not None:
            slots = jax.device_put(slots, spread(mesh, len(mine)))
            unet_params = jax.device_put(unet_params, sharding.replicated(mesh))
        if not curves:  # compiles, so that no curve's seconds hold it
            step(jax.tree.map(jnp.copy, slots), unet_params)

        def advance(slots: Slots, done: int, steps: int, base=unet_params) -> tuple[Slots, float]:
            began = time.perf_counter()
            for _ in range((steps - done) // unit):
                slots = step(slots, base)
            return slots, time.perf_counter() - began

        curves[name] = run_curve(slots, advance, scores, checkpoints, seconds)
    return curves


def fitting_checkpoints(
    checkpoints: Sequence[int], num_steps: int, given: Collection[str]
) -> tuple[tuple[int, ...], str]:
    """(those within the recipe's steps, a line that says which are not; "" = none).

    Args:
        given: dotted names of the keys that somebody gave a value of their own.

    Raises:
        UserError: they were given, and one lies beyond, or none is within.
    """
    key = "evaluate.steps_to_quality.checkpoints"
    within = tuple(step for step in checkpoints if step <= num_steps)
    if len(within) == len(checkpoints):
        return within, ""
    if key in given or len(within) < 2:
        raise UserError(
            f"--config.{key}: got {max(checkpoints)}, expected at most the {num_steps} steps of "
            "the conventional recipe"
        )
    beyond = [str(step) for step in checkpoints if step > num_steps]
    return within, f"{key} beyond the {num_steps} steps of a fit left out: {', '.join(beyond)}"
