"""What the report says beyond scores: copies or new LoRAs, weights, learning, the way between two
people. Each part takes what an `Evaluation` has loaded and gives a `Section`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Float, Params
from hyperlora_jax.evaluate.audits import confidence
from hyperlora_jax.evaluate.audits.memorisation import image_memorisation
from hyperlora_jax.evaluate.audits.quality_curves import quality_curves
from hyperlora_jax.evaluate.compare import MethodResult
from hyperlora_jax.evaluate.exams import RENDERS
from hyperlora_jax.evaluate.methods import sample_images
from hyperlora_jax.evaluate.picture_sets import AnySet
from hyperlora_jax.evaluate.protocol import EvaluationSet, Questions
from hyperlora_jax.evaluate.report import sections
from hyperlora_jax.evaluate.report.sections import Section
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.parallel import multihost
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.worlds.by_style import World

STARTS = ("mean_lora", "nearest", "knn", "generated")  # of steps to quality
NUM_PAIRS = 4
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_TRAINING_RENDERS = 64


def all_sections(evaluation: Any, results: Mapping[str, MethodResult]) -> list[Section]:
    """Every section of an `Evaluation` that its results allow; steps to quality if asked for."""
    sources = evaluation.sources(_needed(results))

    def loras(name: str, questions: Questions) -> Params:
        return jax.device_get(sources[name].loras_of(questions, results[name].guidance))

    all_of_them: list[Section] = []
    fitted = loras("conventional", evaluation.test) if "conventional" in results else None
    if "generated" in results:
        generated, test = loras("generated", evaluation.test), evaluation.test
        strength, num_steps = results["generated"].strength, evaluation.sampling["num_steps"]
        all_of_them += copies_section(
            evaluation.spec,
            evaluation.exam.avatars,
            test,
            generated,
            results["generated"].images,
            evaluation.context.vectors,
            frozenset(evaluation.hyper.facts.get("trained_on", ())),
            evaluation.scratch / RENDERS,
        )
        all_of_them += weight_sections(evaluation.sd, test, generated, fitted, strength, num_steps)
        all_of_them += _confidence(evaluation, results["generated"])
    metrics_file = evaluation.workdir / "metrics.jsonl"
    if metrics_file.exists():
        all_of_them.append(sections.learning_section(metrics_file))
    wanted = evaluation.config.evaluate.steps_to_quality
    if not wanted.num_identities or fitted is None:
        return all_of_them
    conventional = results["conventional"]
    count = min(wanted.num_identities, factors.num_loras(fitted))
    questions = evaluation.test.first(count)
    took = {"generated": evaluation.seconds_per_lora(evaluation.hyper) * count}
    starts = {}
    for name in [name for name in STARTS if name in results]:
        strength = results[name].strength / conventional.strength
        starts[name] = factors.scale(loras(name, questions), strength), took.get(name, 0.0)

    def score(fitted: Params) -> Mapping[str, np.ndarray]:
        images = sample_images(
            evaluation.sampler, questions, fitted, conventional.strength, **evaluation.sampling
        )
        return evaluation.exam.score(questions, images).columns()

    curves = quality_curves(
        evaluation.sd,
        evaluation.spec,
        evaluation.context.fitted.recipe,
        questions,
        starts,
        score,
        checkpoints=evaluation.checkpoints,
        mesh=evaluation.mesh if evaluation.mesh.size > 1 else None,
    )
    return [*all_of_them, sections.steps_section(curves, conventional.scores.top1[:count])]


def _confidence(evaluation: Any, generated: MethodResult) -> list[Section]:
    hyper, references = evaluation.hyper, evaluation.test.seen_references
    if hyper.familiarity(references[:1]) is None:
        return []
    others = confidence.strangers(references, evaluation.exam.avatars)
    losses = generated.scores.loss.mean(axis=1)
    return [confidence.confidence_section(hyper.familiarity, references, others, losses)]


def _needed(results: Mapping[str, MethodResult]) -> list[str]:
    return [name for name in (*STARTS, "conventional") if name in results]


def copies_section(
    spec: LoraSpec,
    avatars: World | None,
    test: AnySet,
    generated: Params,
    pictures: Float[np.ndarray, "i c h w 3"],
    training: Float[np.ndarray, "m d"] | None,
    training_ids: frozenset[str],
    renders: Path | None = None,
) -> Iterator[Section]:
    """Whether generated LoRAs copy those of training; nothing where there are too few of them.

    Args:
        avatars: the world of the exact pictures, None where there are none.
        generated: one LoRA per test identity.
        pictures: what they drew.
        training: LoRA vectors the hypernetwork could have copied, None where there are none.
        training_ids: identities it was trained on; their exact renders are the audit's suspects.
        renders: folder that keeps exact pictures.
    """
    if training is not None and len(training) >= 4:
        training_loras = vectorize.unflatten(jnp.asarray(training), spec)
        images = None
        if avatars is not None and isinstance(test, EvaluationSet):
            num = pictures.shape[1]
            suspects = multihost.first_then_others(
                "training renders",
                lambda: _training_renders(avatars, test, training_ids, num, renders),
            )
            if suspects.shape[2]:
                images = image_memorisation(pictures, test.exact, suspects)
        yield sections.memorisation_section(generated, training_loras, images)


def weight_sections(
    sd: StableDiffusion,
    test: AnySet,
    generated: Params,
    conventional: Params | None,
    strength: float,
    num_steps: int,
) -> Iterator[Section]:
    """Generated weights beside fitted ones (of the first test identities), and the way between two
    people, drawn at a strength in so many steps."""
    if conventional is not None:
        count = factors.num_loras(conventional)
        yield sections.weight_section(factors.index(generated, slice(count)), conventional)
    if test.num_identities > 1:
        strips = interpolation_strips(sd, test, generated, strength, num_steps)
        yield sections.interpolation_section(strips, WEIGHTS)


def interpolation_strips(
    sd: StableDiffusion, test: Questions, loras: Params, strength: float, num_steps: int
) -> Float[np.ndarray, "p k h w 3"]:
    """Pictures from one identity's LoRA to the next one's, one caption and noise per pair.

    The LoRA between is exact, (1 − w) Δ_a + w Δ_b, by joining ranks.
    """
    pairs = min(NUM_PAIRS, test.num_identities // 2)
    noise = np.asarray(
        test.first(2 * pairs).noise((*sd.unet.settings.sample_size, sd.unet.settings.out_channels))
    )
    rows = []
    for pair in range(pairs):
        a, b = (factors.index(loras, 2 * pair + k) for k in (0, 1))
        between = [
            factors.concatenate_ranks(factors.scale(a, 1.0 - w), factors.scale(b, w))
            for w in WEIGHTS
        ]
        start = np.repeat(noise[2 * pair, :1], len(WEIGHTS), axis=0)
        images = sd.sample(
            jax.random.key(0),
            [test.captions[2 * pair][0]] * len(WEIGHTS),
            lora=factors.stack(between),
            strength=strength,
            num_steps=num_steps,
            guidance=1.0,
            latents=start,
        )
        rows.append(np.asarray(images))
    return np.stack(rows)


def _training_renders(
    avatars: World,
    test: EvaluationSet,
    training_ids: frozenset[str],
    num_captions: int,
    renders: Path | None = None,
) -> Float[np.ndarray, "i c t h w 3"]:
    """Exact renders of training identities under the captions of the test set."""
    people = [avatars.identity("train", k) for k in range(NUM_TRAINING_RENDERS)]
    people = [person for person in people if person.id in training_ids]
    pool = test.facts["identity_seed"] * test.pool.shape[1]
    views = avatars.views("test", test.pool.shape[1], pool)
    pairs = [(person, view) for view in views for person in people]
    if not people:  # trained on other subjects: nobody to suspect
        return np.zeros((*test.exact.shape[:2], 0, *test.exact.shape[2:]), np.float32)
    drawn = np.asarray(avatars.render_many(pairs, renders), np.float32) / 255.0
    drawn = drawn.reshape(len(views), len(people), *drawn.shape[1:])
    return drawn[test.caption_index[:, :num_captions]]
