"""Compares methods on the same identities, captions and noise, each at its own best strength.

Strength is a hyper-parameter of every method: predictions shrink towards the mean LoRA and short
fits under-shoot. It is chosen on validation identities (`choose_strength`) and told with the score.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hyperlora_jax.array_types import AnyArray, Float, Int
from hyperlora_jax.evaluate import metrics
from hyperlora_jax.evaluate.protocol import EvaluationSet
from hyperlora_jax.evaluate.sample_cache import SampleCache

TIED_TOP1 = 0.01  # identity scores this close count as equal when a strength is chosen
Sampler = Callable[..., AnyArray]  # (evaluation set, strength[, guidance]) -> pictures


@runtime_checkable
class Probe(Protocol):
    """What `AttributeProbe` offers: class index per caption part."""

    def classes(self, images: Float[AnyArray, "*batch h w 3"]) -> Int[np.ndarray, "*batch q"]:
        """[..., h, w, 3] in [0, 1] -> [..., q]."""
        ...


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to draw pictures of unseen identities.

    Attributes:
      name: as it appears in tables.
      sample: (evaluation set, strength) -> pictures [i', c, h, w, 3]; i' may be less than the
        set's identities (the first ones), for a method too slow to do all. A third argument,
        the guidance, is given where it is not 1.
      strengths: what to choose from; one entry means there is nothing to choose.
      guidances: likewise; chosen first, at the strength 1.
      fingerprint: hash of weights and settings; lets a `SampleCache` keep the pictures.
    """

    name: str
    sample: Sampler
    strengths: tuple[float, ...] = (1.0,)
    fingerprint: str = ""
    guidances: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one method at one strength, i' identities, c captions, q caption parts."""

    top1: Float[np.ndarray, "i c"]
    error: Float[np.ndarray, "i c"]
    caption: Float[np.ndarray, "i c q"]
    diversity: Float[np.ndarray, " i"]
    num_failures: int


@dataclasses.dataclass(frozen=True, eq=False)
class MethodResult:
    """Test pictures and scores of a method, and how its strength was chosen.

    Attributes:
      images: [i', c, h, w, 3].
      scores: on the test set.
      strength: the chosen one.
      curve: {strength: validation scores}; empty when there was nothing to choose.
      guidance: the chosen one; guidance_curve: {guidance: validation scores at strength 1}.
    """

    images: Float[np.ndarray, "i c h w 3"]
    scores: Scores
    strength: float
    curve: Mapping[float, Scores]
    guidance: float = 1.0
    guidance_curve: Mapping[float, Scores] = dataclasses.field(default_factory=dict)


def score(evaluation: EvaluationSet, images: Float[AnyArray, "i c h w 3"], probe: Probe) -> Scores:
    """Scores pictures of the first len(images) identities; failures count as wrong."""
    count = len(images)
    if not 0 < count <= evaluation.num_identities:
        raise ValueError(
            f"expected pictures of 1 to {evaluation.num_identities} identities. Got: {count=}"
        )
    questions, pictures = evaluation.first(count), np.asarray(images, np.float32)
    exact, finite = questions.exact, metrics.is_finite(pictures)
    if pictures.shape != exact.shape:
        raise ValueError(f"pictures of another shape. Got: {pictures.shape=} and {exact.shape=}")
    top1 = [
        metrics.identity_top1(pictures[i : i + 1], questions.candidate_renders(i)[None])[0]
        for i in range(count)
    ]
    return Scores(
        top1=np.stack(top1),
        error=metrics.image_error(pictures, exact),
        caption=metrics.caption_accuracy(probe.classes(pictures), questions.caption_labels, finite),
        diversity=metrics.diversity(pictures, exact),
        num_failures=int((~finite).sum()),
    )


def choose_strength(curve: Mapping[float, Scores]) -> float:
    """The strength with the highest identity top-1; of those within TIED_TOP1, the least error."""
    best = max(scores.top1.mean() for scores in curve.values())
    tied = {s: c.error.mean() for s, c in curve.items() if c.top1.mean() >= best - TIED_TOP1}
    return min(tied, key=lambda strength: tied[strength])


def run_method(
    method: Method,
    validation: EvaluationSet,
    test: EvaluationSet,
    probe: Probe,
    cache: SampleCache | None = None,
) -> MethodResult:
    """Chooses the method's guidance and strength on `validation`, then scores it on `test`."""
    cache = cache or SampleCache()

    def images(questions: EvaluationSet, strength: float, guidance: float) -> np.ndarray:
        given = () if guidance == 1.0 else (guidance,)
        mark = method.fingerprint
        if mark and given:
            mark = f"{mark} guidance {guidance:g}"
        return cache.images(
            mark, questions, strength, lambda: method.sample(questions, strength, *given)
        )

    guided, guidance = {}, method.guidances[0]
    if len(method.guidances) > 1:
        for candidate in method.guidances:
            guided[candidate] = score(validation, images(validation, 1.0, candidate), probe)
        guidance = choose_strength(guided)
    curve, strength = {}, method.strengths[0]
    if len(method.strengths) > 1:
        for candidate in method.strengths:
            curve[candidate] = score(validation, images(validation, candidate, guidance), probe)
        strength = choose_strength(curve)
    pictures = images(test, strength, guidance)
    scores = score(test, pictures, probe)
    return MethodResult(pictures, scores, strength, curve, guidance, guided)


def known_methods() -> tuple[Method, Method]:
    """The two that need no model: the exact render and the reference picture copied."""

    def exact(questions: EvaluationSet, strength: float) -> np.ndarray:
        return questions.exact

    def copy_reference(questions: EvaluationSet, strength: float) -> np.ndarray:
        return np.repeat(questions.references[:, None], questions.num_captions, axis=1)

    return Method("copy_reference", copy_reference), Method("exact", exact)


def compare(
    methods: Sequence[Method],
    validation: EvaluationSet,
    test: EvaluationSet,
    probe: Probe,
    cache: SampleCache | None = None,
    say: Callable[[str], Any] = lambda message: None,
) -> dict[str, MethodResult]:
    """Runs every method, and the two of `known_methods`, in the order given.

    Args:
      methods: at most one per name.
      validation, test: see `protocol.make_evaluation_set`.
      probe: judges captions.
      cache: keeps pictures between runs.
      say: told what is being done, one line at a time.
    """
    every = [*methods, *(m for m in known_methods() if m.name not in {n.name for n in methods})]
    if len({method.name for method in every}) != len(every):
        raise ValueError(f"two methods of one name. Got: {[method.name for method in every]}")
    results = {}
    for method in every:
        say(f"evaluating {method.name} at {len(method.strengths)} strength(s)")
        results[method.name] = run_method(method, validation, test, probe, cache)
    return results
