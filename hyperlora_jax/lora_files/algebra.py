"""Arithmetic on LoRAs of different files, and between LoRAs and whole checkpoints.

Sums are exact: ranks are joined, no in×out matrix is built. Only `extract` and
`merge_into_checkpoint` touch full matrices, one at a time.
"""

import dataclasses
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors, gauge
from hyperlora_jax.lora.sites import (
    PRESETS,
    LoraSite,
    LoraSpec,
    site_factors,
    tree_from_sites,
)
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.lora_files.base_check import read_base_model, tensor_files
from hyperlora_jax.shipped import base_path

Lora = tuple[Params, LoraSpec]


def merge(loras: Sequence[Lora], weights: Sequence[float], rank: int | None = None) -> Lora:
    """Σ weight · LoRA. Exact with `rank` None (ranks add up); else the best of that rank.

    A site that only some of the LoRAs have is kept. Raises UserError when sizes differ.
    """
    if not loras or len(loras) != len(weights):
        raise UserError(f"merge: {len(loras)} LoRAs and {len(weights)} weights; expected as many")
    sites: dict[str, LoraSite] = {}
    total: Params = {}
    for (lora, spec), weight in zip(loras, weights, strict=True):
        for site in spec.sites:
            sites[site.path] = _joined(sites.get(site.path), site)
        total = factors.concatenate_ranks(total, factors.scale(lora, weight))
    spec = LoraSpec(tuple(sites.values()))
    return (total, spec) if rank is None else gauge.lower_ranks(total, spec, rank)


def _joined(first: LoraSite | None, second: LoraSite) -> LoraSite:
    if first is None:
        return second
    if dataclasses.replace(first, rank=1) != dataclasses.replace(second, rank=1):
        sizes = [f"{s.kind} {s.in_features}→{s.out_features}" for s in (first, second)]
        raise UserError(f"merge: layer {first.path} is {sizes[0]} in one LoRA, {sizes[1]} in other")
    return dataclasses.replace(first, rank=first.rank + second.rank)


def subtract(a: Lora, b: Lora, rank: int | None = None) -> Lora:
    """a - b, exactly or at a rank."""
    return merge([a, b], [1.0, -1.0], rank)


def resize(lora: Lora, rank: int) -> Lora:
    """Best LoRA of a smaller rank (SVD of every site's delta); smaller sites stay."""
    if rank < 1:
        raise UserError(f"resize: rank is {rank}, expected at least 1")
    return gauge.lower_ranks(*lora, rank)


def extract(
    base: str | Path,
    tuned: str | Path,
    rank: int,
    preset: str | Sequence[str] = "attn-ff",
    component: str = "unet",
) -> Lora:
    """LoRA of the difference between two diffusers directories: truncated SVD layer by layer.

    `preset` as in `spec_from_shapes`. Raises UserError when the models differ in shape.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise UserError(f"LoRA preset {preset!r} is unknown; expected one of {sorted(PRESETS)}")
    rules = [re.compile(rule) for rule in (PRESETS[preset] if isinstance(preset, str) else preset)]
    before, after = read_base_model(base).layers, read_base_model(tuned).layers
    chosen = [
        site
        for path, site in before.items()
        if site.component == component and any(rule.search(path) for rule in rules)
    ]
    if not chosen:
        raise UserError(f"LoRA preset {preset!r} matches no layer of {base}")
    for site in chosen:
        if after.get(site.path) != site:
            raise UserError(f"{tuned}: layer {site.path} is absent or of another shape than {base}")
    wanted = {site.path for site in chosen}
    new = dict(_weights(Path(base_path(str(tuned))), component, wanted))
    pairs, sites = {}, []
    for path, old in _weights(Path(base_path(str(base))), component, wanted):
        change = np.asarray(new[path], np.float32) - np.asarray(old, np.float32)
        layer = before[path]
        site = dataclasses.replace(layer, rank=min(rank, layer.fan_in, layer.out_features))
        pairs[path] = _truncated(change, site)
        sites.append(site)
    return tree_from_sites(pairs), LoraSpec(tuple(sites))


def _truncated(change: np.ndarray, site: LoraSite) -> dict[str, np.ndarray]:
    """Balanced factors of one PyTorch weight difference, at the site's rank."""
    order = (1, 0) if change.ndim == 2 else (2, 3, 1, 0)
    matrix = change.transpose(order).reshape(site.fan_in, site.out_features)
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(sigma[: site.rank])
    down, up = left[:, : site.rank] * root, root[:, None] * right[: site.rank]
    return {"down": down.reshape(site.down_shape), "up": up}


def _weights(folder: Path, component: str, paths: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(site path, view of its weight) of the wanted layers."""
    for file, names in tensor_files(folder / component, component):
        tensors = safetensors_io.read(file)[0]
        for path, key in names.items():
            if path in paths:
                yield path, tensors[key]


def merge_into_checkpoint(
    base: str | Path, lora: Lora, out: str | Path, strength: float = 1.0
) -> Path:
    """Copy of a diffusers directory with strength · delta added to its weights.

    Dtypes and files stay as they are. Raises UserError when `out` exists or a site has no layer.
    """
    source, target = Path(base_path(str(base))), Path(out)
    tree, spec = lora
    if target.exists():
        raise UserError(f"{target}: already exists, expected a new folder")
    layers = read_base_model(source).layers
    for site in spec.sites:
        layer = layers.get(site.path)
        if layer is None or dataclasses.replace(site, rank=1, kind=layer.kind) != layer:
            raise UserError(f"{source}: has no layer {site.path} of the LoRA's size")
    components = {site.component for site in spec.sites}
    weights = {
        file for component in components for file, _ in tensor_files(source / component, component)
    }
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    skipped = {str(file) for file in weights}
    shutil.copytree(
        source,
        temporary,
        ignore=lambda folder, names: [n for n in names if str(Path(folder) / n) in skipped],
    )
    for component in sorted(components):
        for file, names in tensor_files(source / component, component):
            _merge_file(file, temporary / file.relative_to(source), names, tree, spec, strength)
    temporary.replace(target)
    return target


def _merge_file(
    file: Path, out: Path, names: dict[str, str], tree: Params, spec: LoraSpec, strength: float
) -> None:
    tensors, metadata = safetensors_io.read(file)
    paths = {key: path for path, key in names.items() if path in spec.by_path}

    def changed(key: str) -> np.ndarray:
        weight = tensors[key]
        if key not in paths:
            return weight
        site = spec.by_path[paths[key]]
        pair = site_factors(tree, site)
        down = np.asarray(pair["down"], np.float32).reshape(site.fan_in, site.rank)
        delta = np.float32(strength) * (down @ np.asarray(pair["up"], np.float32))
        if weight.ndim == 2:
            delta = delta.T
        else:
            window = (*weight.shape[2:], weight.shape[1], weight.shape[0])
            delta = delta.reshape(window).transpose(3, 2, 0, 1)
        return (weight.astype(np.float32) + delta).astype(weight.dtype)

    safetensors_io.write_streamed(out, tensors, changed, metadata)
