"""What a LoRA file holds, as plain data."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax.lora.sites import LoraSpec, site_factors
from hyperlora_jax.lora_files import compatibility, convert, keys
from hyperlora_jax.lora_files import family as families
from hyperlora_jax.lora_files.base_check import of_family
from hyperlora_jax.lora_files.base_model import BaseModel
from hyperlora_jax.lora_files.reading import load_lora, read_tensors


def inspect_lora(path: str | os.PathLike[str], base: str | None = None) -> dict[str, Any]:
    """JSON-able report: form, family, sites with singular values, norms, tools, header texts.

    `base` is a diffusers directory or a family. Raises UserError for what is no readable LoRA.
    """
    given = convert.open_base(base)
    model = given if isinstance(given, BaseModel) else None
    lora, spec = as_it_is = load_lora(path)
    tensors, metadata = read_tensors(Path(path))
    family, evidence = families.tell(spec, metadata)
    if given is not None:
        family = model.family if model else families.check(str(base), spec)
        evidence = "given"
    lora, spec = load_lora(path, model) if model else of_family(path, lora, spec, family)
    fits = spec == as_it_is[1] and _equal_dimensions(tensors)
    rows = compatibility.source_report(tensors, metadata, spec, family, fits)
    sites, squares, effective = _sites(lora, spec)
    return {
        "path": str(path),
        "form": compatibility.form_of(tensors),
        "family": family,
        "evidence": evidence,
        "fingerprint": spec.fingerprint,
        "num_parameters": spec.num_parameters,
        "sites": sites,
        "norm": float(np.sqrt(squares)),
        "effective_rank": float(np.mean(effective)),
        "dtypes": sorted({array.dtype.name for key, array in tensors.items() if _is_factor(key)}),
        "metadata": metadata,
        "notes": compatibility.scale_notes(tensors),
        "tools": [dataclasses.asdict(row) for row in rows],
    }


def _equal_dimensions(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether both factors of every layer have as many dimensions."""
    found: dict[str, set[int]] = {}
    for key, array in tensors.items():
        role = keys.split_role(key)
        if role is not None and role[1] in ("down", "up"):
            found.setdefault(role[0], set()).add(array.ndim)
    return all(len(dimensions) == 1 for dimensions in found.values())


def _is_factor(key: str) -> bool:
    return not key.endswith((".alpha", ".scale"))


def _sites(lora: Any, spec: LoraSpec) -> tuple[list[dict[str, Any]], float, list[float]]:
    """Rows of the sites, sum of squared norms, and exp(entropy of σ²) of each site."""
    rows, squares, effective = [], 0.0, []
    for site in spec.sites:
        pair = site_factors(lora, site)
        down = pair["down"].reshape(site.fan_in, site.rank).astype(np.float64)
        upper_down = np.linalg.qr(down, mode="r")
        upper_up = np.linalg.qr(pair["up"].T.astype(np.float64), mode="r")
        sigma = np.linalg.svd(upper_down @ upper_up.T, compute_uv=False)
        energy = sigma**2
        squares += float(energy.sum())
        share = energy[energy > 0] / max(energy.sum(), 1e-300)
        effective.append(float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0)
        rows.append(
            {
                "path": site.path,
                "size": f"{site.in_features}→{site.out_features}",
                "kind": site.kind,
                "rank": site.rank,
                "norm": float(np.sqrt(energy.sum())),
                "singular_values": [float(value) for value in sigma],
            }
        )
    return rows, squares, effective
