"""Compares methods on the same identities, captions and noise, each at its own best strength.

Strength is a hyper-parameter of every method: predictions shrink towards the mean LoRA and short
fits under-shoot. It is chosen on validation identities (`choose_strength`) and told with the
score. A scorer turns pictures into scores: `scorer` where answers are exact, `PictureScorer` of
`picture_scores.py` where there are only other pictures of the same subject.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from hyperlora_jax.array_types import AnyArray, Float, Int
from hyperlora_jax.evaluate import metrics
from hyperlora_jax.evaluate.picture_sets import AnySet
from hyperlora_jax.evaluate.protocol import EvaluationSet
from hyperlora_jax.evaluate.sample_cache import SampleCache

TIED_TOP1 = 0.01  # identity scores this close count as equal when a strength is chosen
FURTHER, STRIDE = 3, 1.5  # strengths beyond the end of a grid, and how far each lies from the last
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
      strengths: what to choose from, and up to `FURTHER` beyond an end that is the best; one entry
        means there is nothing to choose.
      guidances: likewise; chosen first, at the strength 1.
      fingerprint: hash of weights and settings; lets a `SampleCache` keep the pictures.
    """

    name: str
    sample: Sampler
    strengths: tuple[float, ...] = (1.0,)
    fingerprint: str = ""
    guidances: tuple[float, ...] = (1.0,)


@runtime_checkable
class AnyScores(Protocol):
    """Scores of one method at one strength, i' identities, c captions.

    `top1` [i', c] says who is recognised, `loss` [i', c] breaks ties and orders failures (less is
    better), `taken_for` [i', c] is the nearest candidate's row; `columns` names every score that
    has a mean and paired differences in tables.
    """

    LOSS_TITLE: ClassVar[str]

    @property
    def diversity(self) -> Float[np.ndarray, " i"]: ...  # noqa: D102

    @property
    def num_failures(self) -> int: ...  # noqa: D102

    @property
    def top1(self) -> Float[np.ndarray, "i c"]: ...  # noqa: D102

    @property
    def loss(self) -> Float[np.ndarray, "i c"]: ...  # noqa: D102

    @property
    def taken_for(self) -> Int[np.ndarray, "i c"]: ...  # noqa: D102

    def columns(self) -> dict[str, np.ndarray]: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores against exact renders, i' identities, c captions, q caption parts."""

    LOSS_TITLE: ClassVar[str] = "error to the exact picture"

    top1: Float[np.ndarray, "i c"]
    error: Float[np.ndarray, "i c"]
    caption: Float[np.ndarray, "i c q"]
    diversity: Float[np.ndarray, " i"]
    num_failures: int
    taken_for: Int[np.ndarray, "i c"]

    @property
    def loss(self) -> Float[np.ndarray, "i c"]:
        """The error."""
        return self.error

    def columns(self) -> dict[str, np.ndarray]:
        """Scores by the name that metrics.json gives them."""
        return {
            "identity_top1": self.top1,
            "image_error": self.error,
            "caption_accuracy": self.caption,
        }


# (questions, pictures of their first identities) -> scores
Scorer = Callable[[Any, AnyArray], AnyScores]


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
    scores: AnyScores
    strength: float
    curve: Mapping[float, AnyScores]
    guidance: float = 1.0
    guidance_curve: Mapping[float, AnyScores] = dataclasses.field(default_factory=dict)


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
    columns = [
        metrics.nearest_candidates(pictures[i : i + 1], questions.candidate_renders(i)[None])
        for i in range(count)
    ]
    nearest = np.concatenate([column for _, column in columns])
    return Scores(
        top1=np.concatenate([share for share, _ in columns]),
        error=metrics.image_error(pictures, exact),
        caption=metrics.caption_accuracy(probe.classes(pictures), questions.caption_labels, finite),
        diversity=metrics.diversity(pictures, exact),
        num_failures=int((~finite).sum()),
        taken_for=np.take_along_axis(questions.candidates, nearest, axis=1),
    )


def scorer(probe: Probe) -> Scorer:
    """`score` with a judge of captions."""
    return functools.partial(score, probe=probe)


def choose_strength(curve: Mapping[float, AnyScores]) -> float:
    """The strength with the highest identity top-1; of those within TIED_TOP1, the least loss."""
    best = max(scores.top1.mean() for scores in curve.values())
    tied = {s: c.loss.mean() for s, c in curve.items() if c.top1.mean() >= best - TIED_TOP1}
    return min(tied, key=lambda strength: tied[strength])


def _beyond(best: float, tried: Sequence[float]) -> float | None:
    """The next strength outwards where the best one is the least or the greatest of those tried:
    a best that lies at the end of a grid says that the grid ends too early."""
    if best == max(tried):
        return round(best * STRIDE, 4)
    return round(best / STRIDE, 4) if best == min(tried) else None


def run_method(
    method: Method,
    validation: AnySet | None,
    test: AnySet,
    judge: Scorer,
    cache: SampleCache | None = None,
) -> MethodResult:
    """Chooses the method's guidance and strength on `validation`, then scores it on `test`.

    Raises:
      ValueError: something to choose, and nobody to choose it on.
    """
    cache = cache or SampleCache()
    if validation is None and len(method.guidances) + len(method.strengths) > 2:
        raise ValueError(f"no validation set to choose on. Got: {method.strengths=}")

    def images(questions: AnySet, strength: float, guidance: float) -> np.ndarray:
        given = () if guidance == 1.0 else (guidance,)
        mark = method.fingerprint
        if mark and given:
            mark = f"{mark} guidance {guidance:g}"
        return cache.images(
            mark, questions, strength, lambda: method.sample(questions, strength, *given)
        )

    guided, guidance = {}, method.guidances[0]
    if validation is not None and len(method.guidances) > 1:
        for candidate in method.guidances:
            guided[candidate] = judge(validation, images(validation, 1.0, candidate))
        guidance = choose_strength(guided)
    curve, strength = {}, method.strengths[0]
    if validation is not None and len(method.strengths) > 1:
        candidates = list(method.strengths)
        for candidate in candidates:  # grows below
            curve[candidate] = judge(validation, images(validation, candidate, guidance))
            strength = choose_strength(curve)
            further = _beyond(strength, candidates)
            if len(curve) == len(candidates) < len(method.strengths) + FURTHER and further:
                candidates.append(further)
    pictures = images(test, strength, guidance)
    scores = judge(test, pictures)
    return MethodResult(pictures, scores, strength, curve, guidance, guided)


def known_methods(test: AnySet) -> tuple[Method, ...]:
    """The ones that need no model: the reference picture copied, and the exact render if any."""

    def copy_reference(questions: AnySet, strength: float) -> np.ndarray:
        return np.repeat(questions.references[:, None], questions.num_captions, axis=1)

    def exact(questions: EvaluationSet, strength: float) -> np.ndarray:
        return questions.exact

    copied = Method("copy_reference", copy_reference)
    return (copied, Method("exact", exact)) if isinstance(test, EvaluationSet) else (copied,)


def compare(
    methods: Sequence[Method],
    validation: AnySet | None,
    test: AnySet,
    judge: Scorer,
    cache: SampleCache | None = None,
    say: Callable[[str], object] = lambda message: None,
) -> dict[str, MethodResult]:
    """Runs every method, and those of `known_methods`, in the order given.

    Args:
      methods: at most one per name.
      validation, test: see `protocol.make_evaluation_set` and `picture_sets`; without the first,
        no method may have anything to choose.
      judge: scores pictures.
      cache: keeps pictures between runs.
      say: told what is being done, one line at a time.
    """
    every = [*methods, *(m for m in known_methods(test) if m.name not in {n.name for n in methods})]
    if len({method.name for method in every}) != len(every):
        raise ValueError(f"two methods of one name. Got: {[method.name for method in every]}")
    results = {}
    for method in every:
        count = len(method.strengths)
        say(f"evaluating {method.name}" + (f" at {count} strengths" if count > 1 else ""))
        results[method.name] = run_method(method, validation, test, judge, cache)
    return results
