"""The experiments' part of docs/results.md, from docs/measurements/experiment_NAME.json.

A record is {"name", "title", "command", "rows"}; a row is one run with one seed: {"run", "seed",
"identity_top1": {"mean", "stderr", "n"}, "image_error", "caption_accuracy", "strength", "guidance",
"steps", "cpu_seconds" (of training), "choosing"}: whether the identities are validation ones, as
the row is there to choose a recipe by; its training means nothing then. "missing" are runs of the
experiment that nobody made yet. Written by tools/experiments.py.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.report import wording

KEYS = ("name", "title", "command", "rows")
SCORES = ("identity_top1", "image_error", "caption_accuracy")
# (run, other): every two runs whose names differ in this alone
CONTRASTS = {"paper": (("adalora", "adanorm"), ("VAE latents", "raw"))}
COLUMNS = (
    "", "identity top-1", "error (MSE)", "caption parts", "strength", "steps", "CPU time", "seeds",
)  # fmt: skip
NOT_OF_TRAINING = 5  # the first columns


def read_experiments(root: epath.PathLike) -> list[Mapping[str, Any]]:
    """All records, in the order of their names.

    Raises:
      UserError: a file that is no such record.
    """
    folder = epath.Path(root) / "docs" / "measurements"
    files = sorted(folder.glob("experiment_*.json"), key=lambda file: file.name)
    records = []
    for file in files if folder.exists() else []:
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read as JSON ({error})") from error
        missing = [key for key in KEYS if key not in record]
        if missing:
            raise UserError(f"{file}: found no {', '.join(missing)}, expected {', '.join(KEYS)}")
        records.append(record)
    return records


def table(record: Mapping[str, Any]) -> list[list[str]]:
    """One row of text per run, all its seeds together, in the order of the record."""
    by_run: dict[str, list[Mapping[str, Any]]] = {}
    for row in record["rows"]:
        by_run.setdefault(row["run"], []).append(row)
    return [[name, *_cells(rows)] for name, rows in by_run.items()]


def columns(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Of `table`."""
    return COLUMNS[:NOT_OF_TRAINING] if _chooses(record["rows"]) else COLUMNS


def _chooses(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row.get("choosing") for row in rows)


def across_seeds(estimates: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Mean and standard error of one score over training seeds.

    The identities are the same for every seed: their standard error (the mean of the seeds') does
    not shrink with more seeds. The spread of the seeds is added to it.
    """
    means = np.array([estimate["mean"] for estimate in estimates])
    identities = float(np.mean([estimate["stderr"] for estimate in estimates]))
    seeds = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0
    return float(means.mean()), float(np.hypot(identities, seeds))


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    scores = [across_seeds([row[score] for row in rows]) for score in SCORES]
    digits = (3, 4, 3)
    cells = [f"{m:.{d}f} ± {e:.{d}f}" for (m, e), d in zip(scores, digits, strict=True)]
    strengths = sorted({row["strength"] for row in rows})
    took = [row["cpu_seconds"] for row in rows]
    cells.append(", ".join(f"{value:g}" for value in strengths))
    if _chooses(rows):
        return cells
    return [
        *cells,
        ", ".join(f"{steps:,}" for steps in sorted({row["steps"] for row in rows})),
        wording.duration(float(np.median(took))),
        str(len(rows)),
    ]


def section(record: Mapping[str, Any]) -> list[str]:
    """(heading, command, note) of one experiment; the rows are `table`."""
    counts = {row["identity_top1"]["n"] for row in record["rows"]}
    who = "validation" if _chooses(record["rows"]) else "held-out"
    return [
        f"## {record['title']}",
        f"`{record['command']}`",
        f"{'/'.join(map(str, sorted(counts)))} {who} identities, the same for all runs; mean ± "
        "standard error over identities and training seeds; every run at the strength that was "
        "best on validation identities." + _contrasts(record) + _missing(record),
    ]


def _missing(record: Mapping[str, Any]) -> str:
    names = record.get("missing", ())
    return f" Not run yet: {'; '.join(names)}." if names else ""


def _contrasts(record: Mapping[str, Any]) -> str:
    """Differences between runs that differ in one thing; pairs of runs and seeds are the unit."""
    scores = {(row["run"], row["seed"]): row["identity_top1"]["mean"] for row in record["rows"]}
    told = ""
    for one, other in CONTRASTS.get(record["name"], ()):
        pairs = [
            (score, scores[name.replace(one, other), seed])
            for (name, seed), score in scores.items()
            if one in name and (name.replace(one, other), seed) in scores
        ]
        if len(pairs) > 1:
            difference = np.array(pairs) @ [1.0, -1.0]
            error = difference.std(ddof=1) / np.sqrt(len(pairs))
            told += (
                f" Identity, {one} minus {other}: {difference.mean():+.3f} ± {error:.3f} over"
                f" {len(pairs)} pairs of rows otherwise named alike, seeds:"
                f" {len({seed for _, seed in scores})}."
            )
    return told
