"""Charts for the report, drawn by matplotlib: PNG bytes, one above the other where there are two
(side by side is unreadable on a phone).
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from hyperlora_jax.evaluate.compare import MethodResult
from hyperlora_jax.evaluate.methods import title


def strength_chart(results: Mapping[str, MethodResult]) -> bytes | None:
    """PNG: identity top-1 and loss against strength, on validation identities; None if no curve.

    The chosen strength of every method is marked.
    """
    curves = {name: result for name, result in results.items() if len(result.curve) > 1}
    if not curves:
        return None
    figure, axes = _new_figure(rows=2)
    for name, result in curves.items():
        strengths = sorted(result.curve)
        for axis, values in zip(
            axes, (_means(result, "top1"), _means(result, "loss")), strict=True
        ):
            y = [values[s] for s in strengths]
            (line,) = axis.plot(strengths, y, marker=".", label=title(name))
            axis.plot([result.strength], [values[result.strength]], "o", color=line.get_color())
    axes[0].set_ylabel("identity top-1")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel(next(iter(curves.values())).scores.LOSS_TITLE)
    axes[1].set_xlabel("strength (● chosen)")
    _legend(figure, axes[1])
    return _png(figure)


def line_chart(
    series: Mapping[str, tuple[Sequence[object], Sequence[object]]],
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> bytes:
    """PNG of lines {name: (x, y)} with a legend."""
    figure, (axis,) = _new_figure(rows=1)
    for name, (x, y) in series.items():
        axis.plot(x, y, marker=".", label=title(name))
    if log_x:
        axis.set_xscale("symlog", linthresh=10.0)
        ticks = sorted({value for x, _ in series.values() for value in x})
        axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axis.minorticks_off()
    elif all(float(value).is_integer() for x, _ in series.values() for value in x):
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    _legend(figure, axis)
    return _png(figure)


def histogram_chart(series: Mapping[str, object], x_label: str, num_bins: int = 30) -> bytes:
    """PNG of overlaid histograms {name: values} over one range."""
    figure, (axis,) = _new_figure(rows=1)
    everything = np.concatenate([np.asarray(values) for values in series.values()])
    bins = np.linspace(everything.min(), everything.max() + 1e-9, num_bins)
    for name, values in series.items():
        axis.hist(np.asarray(values), bins=bins, alpha=0.55, density=True, label=name)
    axis.set_xlabel(x_label)
    axis.set_ylabel("density")
    _legend(figure, axis)
    return _png(figure)


def bar_chart(values: Mapping[str, float], x_label: str) -> bytes:
    """PNG of horizontal bars {name: length}, in the order given from top to bottom."""
    figure, (axis,) = _new_figure(rows=1, height=max(2.4, 0.2 * len(values) + 0.8))
    positions = np.arange(len(values))[::-1]
    axis.barh(positions, list(values.values()))
    axis.set_yticks(positions, list(values), fontsize=8)
    axis.set_xlabel(x_label)
    axis.margins(y=0.01)
    return _png(figure)


def _means(result: MethodResult, score: str) -> dict[float, float]:
    return {s: float(getattr(scores, score).mean()) for s, scores in result.curve.items()}


def _legend(figure, axis) -> None:
    """Below the axes, where it covers no line."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _new_figure(rows: int, height: float = 2.8):
    from cycler import cycler
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    # More lines than colours: the next ten are dashed, so that no two look alike.
    lines = cycler(linestyle=("-", "--", ":")) * rcParams["axes.prop_cycle"]
    figure = Figure(figsize=(4.7, height * rows), dpi=130, layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]
    for axis in axes:
        axis.set_prop_cycle(lines)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
