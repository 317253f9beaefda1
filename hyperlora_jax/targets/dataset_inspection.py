"""What a LoRA-target dataset holds: norms, spectra, duplicates, outliers, pictures.

Everything about weights is measured on the deltas, so the gauge does not matter:
    squared norm     ‖B A‖² = Σ (A Aᵀ) ∘ (Bᵀ B)              r×r Gram matrices
    singular values  of B A = √eigenvalues of (A Aᵀ)(Bᵀ B)
    sketch           y·B A·x for fixed random x, y of every site: copies of a LoRA, scaled or in
                     another gauge, have parallel sketches
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from hyperlora_jax.array_types import Float, UInt8
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.pictures import pictures
from hyperlora_jax.targets.lora_targets import LoraTargets

CHUNK_BYTES = 2**26
SKETCH_SIZE = 256  # numbers per LoRA over all sites, at least
SAME_COSINE = 1 - 1e-5
SAME_SCALE = 1e-3
OUTLIER_Z = 6.0  # robust standard deviations of the log norm
PCA_BYTES = 2**28


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Numbers of n LoRAs: delta norms by site, mean share of energy by component, sketches."""

    norms: Float[np.ndarray, "n s"]
    component_energy: Float[np.ndarray, " r"]
    sketches: Float[np.ndarray, "n k"]


def measure(targets: LoraTargets, indices: np.ndarray) -> Measured:
    """One pass over the vectors of some subjects, in bounded memory."""
    spec = targets.spec
    step = max(1, CHUNK_BYTES // (4 * spec.num_parameters))
    random = np.random.default_rng(0)
    per_site = max(4, math.ceil(SKETCH_SIZE / len(spec)))
    probes = [
        (random.normal(size=(s.fan_in, per_site)), random.normal(size=(s.out_features, per_site)))
        for s in spec.sites
    ]
    norms, sketches = [], []
    energy = np.zeros(spec.max_rank)
    for start in range(0, len(indices), step):
        vectors = targets.loras(indices[start : start + step])
        rows, sketch = [], []
        for (site, a, b), (x, y) in zip(site_matrices(vectors, spec), probes, strict=True):
            squares = squared_singular_values(a, b)
            rows.append(np.sqrt(squares.sum(axis=1)))
            energy[: site.rank] += squares.sum(axis=0)
            sketch.append(np.einsum("nrk,nrk->nk", a @ x, np.swapaxes(b, 1, 2) @ y))
        norms.append(np.stack(rows, axis=1))
        sketches.append(np.concatenate(sketch, axis=1))
    share = energy / energy.sum() if energy.any() else energy
    return Measured(np.concatenate(norms), share, np.concatenate(sketches))


def site_matrices(
    vectors: Float[np.ndarray, "n d"], spec: LoraSpec
) -> Iterator[tuple[LoraSite, np.ndarray, np.ndarray]]:
    """(site, A [n, r, fan_in], B [n, out, r]) for every site of flat vectors."""
    start = 0
    for site in spec.sites:
        middle = start + site.rank * site.fan_in
        stop = middle + site.rank * site.out_features
        a = vectors[:, start:middle].reshape(-1, site.rank, site.fan_in)
        b = vectors[:, middle:stop].reshape(-1, site.out_features, site.rank)
        yield site, a.astype(np.float64), b.astype(np.float64)
        start = stop


def squared_singular_values(
    a: Float[np.ndarray, "n r i"], b: Float[np.ndarray, "n o r"]
) -> Float[np.ndarray, "n r"]:
    """Of B A, descending."""
    product = (a @ np.swapaxes(a, 1, 2)) @ (np.swapaxes(b, 1, 2) @ b)
    if product.shape[1] == 1:
        return np.maximum(product[:, 0], 0)
    return np.sort(np.maximum(np.linalg.eigvals(product).real, 0), axis=1)[:, ::-1]


def find_duplicates(
    sketches: Float[np.ndarray, "n k"], norms: Float[np.ndarray, " n"], block: int = 2048
) -> list[tuple[int, int, float]]:
    """(i, j, factor) with delta_j = factor * delta_i, i < j; every j with its first i only."""
    sizes = np.linalg.norm(sketches, axis=1)
    valid = np.flatnonzero((sizes > 0) & (norms > 0))
    unit = (sketches[valid] / sizes[valid, None]).astype(np.float32)
    duplicates = []
    for start in range(0, len(valid), block):
        rows = unit[start : start + block]
        cosines = unit[: start + len(rows)] @ rows.T
        earlier = np.arange(len(cosines))[:, None] < np.arange(start, start + len(rows))
        same = (np.abs(cosines) > SAME_COSINE) & earlier
        for column in np.flatnonzero(same.any(axis=0)):
            i, j = valid[int(same[:, column].argmax())], valid[start + column]
            sign = np.sign(sketches[i] @ sketches[j])
            duplicates.append((int(i), int(j), float(sign * norms[j] / norms[i])))
    return duplicates


def explained_variance(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Share of variance that the first k principal components explain, k = 1 .. n."""
    centred = vectors - vectors.mean(axis=0)
    values = np.linalg.eigvalsh((centred @ centred.T).astype(np.float64))[::-1]
    values = np.maximum(values, 0)
    return np.cumsum(values) / max(values.sum(), 1e-30)


def inspect_targets(targets: LoraTargets, limit: int | None = None, seed: int = 0) -> dict:
    """A JSON-able report. With `limit` that many subjects are drawn at random to measure."""
    report: dict = {
        "path": str(targets.path),
        "subjects": {split: len(ids) for split, ids in targets.split_ids.items()},
        "identities": len(set(targets.identities)),
        "fingerprint": targets.spec.fingerprint,
        "base_hash": targets.base_hash,
        "sites": len(targets.spec),
        "rank": targets.spec.max_rank,
        "numbers_per_lora": targets.spec.num_parameters,
        "lora_dtype": targets.lora_dtype,
        "encoders": targets.embedding_sizes,
        "facts": targets.facts,
    }
    indices = np.arange(len(targets))
    random = np.random.default_rng(seed)
    if limit is not None and limit < len(indices):
        indices = np.sort(random.choice(indices, limit, replace=False))
    report["measured"] = len(indices)
    first = targets[0]
    report["pictures_of_first"] = [len(first.references), len(first.targets)]
    if len(targets.spec):
        report |= _weights_report(targets, indices, random)
    return report


def _weights_report(targets: LoraTargets, indices: np.ndarray, random) -> dict:
    ids = [targets.ids[i] for i in indices]
    measured = measure(targets, indices)
    totals = np.sqrt(np.square(measured.norms).sum(axis=1))
    empty = np.flatnonzero(totals == 0)
    duplicates = find_duplicates(measured.sketches, totals)
    logs = np.log(np.where(totals > 0, totals, np.nan))
    centre = np.nanmedian(logs) if len(empty) < len(totals) else 0.0
    spread = 1.4826 * np.nanmedian(np.abs(logs - centre)) if len(empty) < len(totals) else 1.0
    scores = np.abs(logs - centre) / max(float(spread), 1e-3)
    outliers = [k for k in np.argsort(-scores) if scores[k] > OUTLIER_Z]
    some = min(len(indices), max(2, PCA_BYTES // (4 * targets.spec.num_parameters)), 512)
    chosen = indices[np.sort(random.permutation(len(indices))[:some])]
    variance = explained_variance(targets.loras(chosen))
    steps = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < len(chosen)]
    return {
        "delta_norm": _five(totals),
        "delta_norm_per_site": {
            site.path: _five(measured.norms[:, k]) for k, site in enumerate(targets.spec.sites)
        },
        "energy_per_component": [float(v) for v in measured.component_energy],
        "explained_variance": {str(k): float(variance[k - 1]) for k in steps},
        "empty": [ids[k] for k in empty],
        "duplicates": [
            {
                "id": ids[j],
                "of": ids[i],
                "factor": factor,
                "kind": "identical" if abs(factor - 1) < SAME_SCALE else "scaled",
            }
            for i, j, factor in duplicates
        ],
        "outliers": [{"id": ids[k], "delta_norm": float(totals[k])} for k in outliers],
    }


def _five(values: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    names = ("min", "quarter", "median", "three_quarters", "max")
    return dict(zip(names, map(float, quantiles), strict=True))


def contact_sheet(
    targets: LoraTargets, columns: int = 8, rows: int = 8, size: int = 96
) -> UInt8[np.ndarray, "h w 3"] | None:
    """First reference (or target) of the first subjects as one picture; None without pictures."""
    sheet = np.full((rows * size, columns * size, 3), 255, np.uint8)
    drawn = 0
    for k in range(min(len(targets), rows * columns)):
        subject = targets[k]
        encoded = (*subject.references, *subject.targets)[:1]
        if not encoded:
            continue
        picture = pictures.decode(encoded[0], size, subject.id)
        row, column = divmod(drawn, columns)
        sheet[row * size : (row + 1) * size, column * size : (column + 1) * size] = picture
        drawn += 1
    used = math.ceil(drawn / columns)
    return sheet[: used * size] if drawn else None


def report_lines(report: dict, shown: int = 8) -> list[str]:
    """The report as text for a terminal."""
    counts = ", ".join(f"{split} {count}" for split, count in report["subjects"].items())
    lines = [
        f"LoRA targets   {report['path']}",
        f"subjects       {counts}; {report['identities']} identities",
        f"layers         {report['sites']} sites, rank {report['rank']}, "
        f"{report['numbers_per_lora']:,} numbers as {report['lora_dtype']}",
        f"spec, base     {report['fingerprint'][:12]}, {report['base_hash'][:12] or 'unknown'}",
        "pictures       {} references, {} targets (first subject)".format(
            *report["pictures_of_first"]
        ),
        f"encoders       {', '.join(report['encoders']) or 'none'}",
    ]
    if "delta_norm" not in report:
        return lines
    norm = report["delta_norm"]
    shares = " ".join(f"{100 * share:.1f}" for share in report["energy_per_component"][:16])
    variance = "  ".join(f"{k}: {v:.0%}" for k, v in report["explained_variance"].items())
    lines += [
        f"measured       {report['measured']} LoRAs",
        f"delta norm     median {norm['median']:.4g}, from {norm['min']:.4g} to {norm['max']:.4g}",
        f"components     % of energy: {shares}",
        f"PCA            variance by components: {variance}",
    ]
    sites = sorted(report["delta_norm_per_site"].items(), key=lambda item: -item[1]["median"])
    lines.append("largest sites  (median norm)")
    lines += [f"  {row['median']:9.4g}  {path}" for path, row in sites[:shown]]
    for name in ("empty", "duplicates", "outliers"):
        rows = report[name]
        lines.append(f"{name:<14} {len(rows) or 'none'}")
        lines += [f"  {_one_line(row)}" for row in rows[:shown]]
        if len(rows) > shown:
            lines.append(f"  … and {len(rows) - shown} more")
    return lines


def _one_line(row) -> str:
    if isinstance(row, str):
        return row
    if "of" in row:
        return f"{row['id']} = {row['factor']:.4g} × {row['of']} ({row['kind']})"
    return f"{row['id']}: delta norm {row['delta_norm']:.4g}"
