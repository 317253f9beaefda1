"""Further sections of the report: each gives its numbers (JSON-able) and its figures.

section = memorisation_section(generated, training)
summary = summarise(...) | {section.name: section.numbers}
write_report(folder, summary, [*standard_figures(...), *section.figures], ...)
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from hyperlora_jax.array_types import AnyArray, Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.audits import quality_curves
from hyperlora_jax.evaluate.audits.memorisation import Audit, audit_loras
from hyperlora_jax.evaluate.audits.quality_curves import Curve
from hyperlora_jax.evaluate.audits.weight_errors import spectrum, weight_errors
from hyperlora_jax.evaluate.report import charts, figures
from hyperlora_jax.evaluate.report.html_page import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
    """Numbers for metrics.json under `name`, and figures for the page."""

    name: str
    numbers: Mapping[str, object]
    figures: tuple[Figure, ...]


def memorisation_section(
    generated: Params, training: Params, images: Mapping[str, float] | None = None
) -> Section:
    """The memorisation audit of generated LoRAs against the training LoRAs.

    Args:
      generated, training: LoRA batches of one spec.
      images: of `memorisation.image_memorisation`, when training renders are at hand.
    """
    audits = audit_loras(generated, training)
    numbers: dict[str, object] = {"weights": {space: a.to_json() for space, a in audits.items()}}
    if images is not None:
        numbers["images"] = dict(images)
    shown = tuple(_memorisation_figure(audit) for audit in audits.values())
    return Section("memorisation", numbers, shown)


def weight_section(predicted: Params, target: Params) -> Section:
    """Weight-space errors against LoRAs fitted to the same identities, per site, and spectra."""
    errors = weight_errors(predicted, target)
    ours, theirs = (_mean_spectrum(lora) for lora in (predicted, target))
    ranks = list(range(1, 1 + max(len(ours), len(theirs))))
    per_site = grouped({path: float(v.mean()) for path, v in errors.site_cosine.items()})
    site_chart = charts.bar_chart(per_site, "cosine of generated and fitted delta")
    series = {"generated": (ranks[: len(ours)], ours), "fitted": (ranks[: len(theirs)], theirs)}
    rank_chart = charts.line_chart(series, "component", "mean singular value")
    shown = (
        Figure(
            "sites",
            site_chart,
            "Cosine between generated and conventionally fitted LoRA, site by site. Fits carry "
            "noise of their own, so even a perfect generator stays far below 1.",
            "Where the weights agree",
            "folded",
        ),
        Figure(
            "spectrum",
            rank_chart,
            "Singular values of the deltas, mean over sites.",
            place="folded",
        ),
    )
    numbers = {**errors.to_json(), "spectrum": {"generated": ours, "fitted": theirs}}
    return Section("weights", numbers, shown)


def grouped(values: Mapping[str, float], most: int = 40) -> dict[str, float]:
    """Values by a short name of their site; sites of one level are averaged if there are many.

    "down_blocks_1/attentions_0/transformer_blocks_0/attn2/to_out_0" becomes
    "down 1.0 attn2 out", or "down 1 attn2 out" when averaged.
    """

    def name(path: str, whole: bool) -> str:
        block, *inner, last = path.split("/")
        place = re.sub(r"_blocks?_?", " ", block).strip()
        index = ".".join(re.findall(r"attentions_(\d+)", path)) if whole else ""
        kind = [part for part in inner if part.startswith("attn")] or inner[-1:]
        words = [f"{place}.{index}" if index else place, *kind, re.sub(r"^to_|_0$", "", last)]
        return " ".join(words)

    groups: dict[str, list[float]] = {}
    for path, value in values.items():
        groups.setdefault(name(path, whole=len(values) <= most), []).append(value)
    return {short: float(np.mean(group)) for short, group in groups.items()}


def steps_section(curves: Mapping[str, Curve], full: Float[AnyArray, "l *rest"]) -> Section:
    """Steps to quality: curves and headline of every initialisation.

    Args:
      curves: {initialisation: curve}; "hypernetwork" and "zero" are compared in words.
      full: identity scores of the full conventional LoRA on the same identities.
    """
    headlines = quality_curves.headlines(curves, full)
    chart = charts.line_chart(
        quality_curves.chart_series(curves), "fitting steps", "identity top-1", log_x=True
    )
    note = "Identity score along a conventional fit, by what it starts from."
    figure = Figure("steps_to_quality", chart, note, "Steps to quality")
    return Section("steps_to_quality", quality_curves.to_json(curves, headlines), (figure,))


def learning_section(metrics_file: epath.PathLike) -> Section:
    """The loss of every logged step of a run's metrics.jsonl.

    Raises:
      UserError: no such file, or lines that are not rows with step and loss.
    """
    try:
        rows = [json.loads(line) for line in epath.Path(metrics_file).read_text().splitlines()]
        steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{metrics_file}: cannot be read ({type(error).__name__}), expected a metrics.jsonl"
        ) from error
    series = {"each logged step": (steps, losses), "mean of 20": (steps, _smooth(losses, 20))}
    chart = charts.line_chart(series, "step", "loss")
    figure = Figure("learning", chart, "Training loss of the hypernetwork.", "Learning curve")
    last = float(np.mean(losses[-20:])) if losses else None
    return Section("learning", {"num_logged": len(rows), "last_loss": last}, (figure,))


def interpolation_section(
    strips: Float[AnyArray, "p k h w 3"], weights: Sequence[float]
) -> Section:
    """Pictures on the way from one generated LoRA to another, one row per pair.

    Args:
      strips: p rows of k pictures, as many as weights.
      weights: share of the second LoRA in every column.

    Raises:
      ValueError: strips with another number of pictures.
    """
    if strips.shape[1] != len(weights):
        raise ValueError(f"a picture per weight. Got: {strips.shape=} and {len(weights)=}")
    columns = {f"{w:g}": list(strips[:, k]) for k, w in enumerate(weights)}
    page = figures.draw_grid(columns, cell=96)
    note = "Share of the second person’s LoRA, from left to right; same caption and noise."
    figure = Figure("interpolation", figures.to_png(page), note, "Between two people")
    return Section("interpolation", {"weights": [float(w) for w in weights]}, (figure,))


def _memorisation_figure(audit: Audit) -> Figure:
    chart = charts.histogram_chart(
        {"generated to training": audit.nearest, "training to training": audit.leave_one_out},
        f"distance to the nearest training LoRA ({audit.space})",
    )
    note = (
        f"Median ratio {audit.median_ratio:.2f}; copies with noise would have "
        f"{audit.noisy_copy_ratio:.2f}. KS {audit.ks_statistic:.2f}, "
        f"{100 * audit.share_below_first_percentile:.0f} % below the first percentile. "
        "A prediction carries no noise of a fit, so a ratio somewhat below 1 is no copying."
    )
    title = "New LoRAs or copies?" if audit.space == "delta" else ""
    return Figure(f"memorisation_{audit.space}", chart, note, title, "folded")


def _mean_spectrum(lora: Params) -> list[float]:
    values = list(spectrum(lora).values())
    width = max(v.shape[1] for v in values)
    padded = [np.pad(v, ((0, 0), (0, width - v.shape[1]))).mean(axis=0) for v in values]
    return [float(x) for x in np.mean(padded, axis=0)]


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at every point."""
    sums = np.cumsum([0.0, *values])
    starts = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    ends = np.arange(1, len(values) + 1)
    return [float(x) for x in (sums[ends] - sums[starts]) / (ends - starts)]
