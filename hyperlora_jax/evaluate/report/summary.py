"""From results to the numbers of metrics.json: every estimate, difference, seed and version."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping

import numpy as np

from hyperlora_jax.array_types import Json, JsonDict
from hyperlora_jax.evaluate import metrics
from hyperlora_jax.evaluate.compare import AnyScores, MethodResult, Scores
from hyperlora_jax.evaluate.picture_sets import AnySet
from hyperlora_jax.evaluate.protocol import EvaluationSet

Columns = Mapping[str, Mapping[str, np.ndarray]]  # {score: {method: [i', c, ...]}}

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "diffusers", "torch", "peft")


def summarise(
    results: Mapping[str, MethodResult],
    test: AnySet,
    validation: AnySet | None,
    *,
    torch_parity: Mapping[str, object] | None = None,
    seconds: Mapping[str, float] | None = None,
    facts: Json | None = None,
    further: Columns | None = None,
    judges: Mapping[str, object] | None = None,
) -> Json:
    """Everything that was measured, JSON-able.

    Args:
      results: of `compare.compare`.
      test, validation: the sets they were made on; nobody to choose on is None.
      torch_parity: {"max_abs_diff", "unexpected_keys", "missing_keys"} of the exported files.
      seconds: per stage, and generate_one_lora and fit_one_lora.
      facts: more to record (base hash, checkpoint, seeds).
      further: scores beside those of `results` (lpips, clip_text).
      judges: of `judges.similarity_numbers`.
    """
    names = list(results)
    scores = {name: results[name].scores for name in names}
    columns = {**_columns(scores), **(further or {})}
    summary: JsonDict = {
        **{column: {n: _mean(columns[column][n]) for n in names} for column in columns},
        "paired": paired(scores),
        "torch_parity": dict(torch_parity or {}),
        "seconds": dict(seconds or {}),
        "diversity": {n: _mean_of_defined(scores[n].diversity) for n in names},
        "failures": {n: scores[n].num_failures for n in names},
        "strength": {n: _strength(results[n]) for n in names},
        "differences": differences(columns),
        "evaluation": {
            name: dict(asked.facts)
            for name, asked in (("test", test), ("validation", validation))
            if asked is not None
        },
        "facts": dict(facts or {}),
        "versions": versions(),
    }
    if isinstance(test, EvaluationSet):
        caption = {n: score.caption for n, score in scores.items() if isinstance(score, Scores)}
        summary["caption_all_parts"] = {n: _mean(caption[n].min(axis=2)) for n in names}
        summary["caption_parts"] = {n: _per_part(caption[n], test) for n in names}
    return {**summary, "judges": dict(judges)} if judges else summary


def paired(scores: Mapping[str, AnyScores]) -> Json:
    """Identity top-1 of generated and conventional on the identities that both have.

    {"generated", "conventional", "ratio", "ratio_stderr", "n"}; empty when one is missing.
    """
    if "generated" not in scores or "conventional" not in scores:
        return {}
    generated, conventional = _common(scores["generated"].top1, scores["conventional"].top1)
    ratio = metrics.paired_ratio(generated, conventional)
    return {
        "generated": float(generated.mean()),
        "conventional": float(conventional.mean()),
        "ratio": _number(ratio.mean),
        "ratio_stderr": _number(ratio.stderr),
        "n": ratio.n,
    }


def differences(columns: Columns, method: str = "generated") -> Json:
    """`method` minus every other, on the identities that both have, with z and a p value.

    {other: {score: {"mean", "stderr", "n", "z", "p"}}}; z is mean / stderr.
    """
    others = [name for name in columns["identity_top1"] if name != method]
    if len(others) == len(columns["identity_top1"]):
        return {}
    return {
        other: {
            name: _difference(column[method], column[other]) for name, column in columns.items()
        }
        for other in others
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that matter, of Python, and the number of cores."""
    installed = {"python": platform.python_version(), "cores": str(os.cpu_count())}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def _columns(scores: Mapping[str, AnyScores]) -> dict[str, dict[str, np.ndarray]]:
    by_method = {name: score.columns() for name, score in scores.items()}
    return {
        column: {name: columns[column] for name, columns in by_method.items()}
        for column in next(iter(by_method.values()))
    }


def _mean(values: np.ndarray) -> Json:
    return metrics.clustered_mean(values).to_json()


def _mean_of_defined(values: np.ndarray) -> Json:
    """Mean over the identities that have such a value at all."""
    defined = values[~np.isnan(values)]
    return _mean(defined) if len(defined) else {"mean": None, "stderr": None, "n": 0}


def _per_part(caption: np.ndarray, test: EvaluationSet) -> dict[str, float]:
    means = caption.mean(axis=(0, 1))
    return {part: float(mean) for part, mean in zip(test.parts, means, strict=True)}


def _strength(result: MethodResult) -> dict[str, object]:
    curve = [
        {"strength": strength, **{name: _mean(v) for name, v in scores.columns().items()}}
        for strength, scores in result.curve.items()
    ]
    chosen = {"best": result.strength, "validation": curve}
    if result.guidance_curve:
        chosen["guidance"] = result.guidance
        chosen["guidance_top1"] = {
            f"{g:g}": _mean(s.top1) for g, s in result.guidance_curve.items()
        }
    return chosen


def _common(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = min(len(first), len(second))
    return first[:count], second[:count]


def _difference(first: np.ndarray, second: np.ndarray) -> Json:
    first, second = _common(first, second)
    estimate = metrics.paired_difference(first, second)
    z = estimate.mean / estimate.stderr if estimate.stderr else float("nan")
    p = metrics.sign_flip_p_value(first, second)
    return {**estimate.to_json(), "z": _number(z), "p": p}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
