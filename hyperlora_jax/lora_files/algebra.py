"""Arithmetic on LoRAs of different files, and between LoRAs and whole checkpoints.

Sums are exact: ranks are joined, no in×out matrix is built. Only `extract` and
`merge_into_checkpoint` touch full matrices, one at a time, and `plain_tensors`, which makes plain
LoRAs of LoHa, LoKr and DoRA.
"""

import dataclasses
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors, gauge, other_kinds
from hyperlora_jax.lora.sites import (
    TEXT_ENCODERS,
    LoraSite,
    LoraSpec,
    chosen_by,
    module_path,
    site_factors,
    tree_from_sites,
)
from hyperlora_jax.lora_files import keys, safetensors_io
from hyperlora_jax.lora_files.base_files import (
    BaseModel,
    layers_per_block_of,
    read_base_model,
    read_weights,
    tensor_files,
    unused_weights,
)
from hyperlora_jax.shipped import base_path

if TYPE_CHECKING:
    from hyperlora_jax.lora_files.base_files import Base

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
    of_preset = chosen_by(preset)
    before, after = read_base_model(base).layers, read_base_model(tuned).layers
    chosen = [s for path, s in before.items() if s.component == component and of_preset(path)]
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
        pairs[path] = _truncated(change, site)[0]
        sites.append(site)
    return tree_from_sites(pairs), LoraSpec(tuple(sites))


def _truncated(change: np.ndarray, site: LoraSite) -> tuple[dict[str, np.ndarray], float]:
    """(balanced factors of one PyTorch weight difference, at the site's rank, relative error)."""
    order = (1, 0) if change.ndim == 2 else (2, 3, 1, 0)
    matrix = change.transpose(order).reshape(site.fan_in, site.out_features)
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(sigma[: site.rank])
    down, up = left[:, : site.rank] * root, root[:, None] * right[: site.rank]
    lost = np.linalg.norm(sigma[site.rank :]) / (np.linalg.norm(sigma) or 1.0)
    return {"down": down.reshape(site.down_shape), "up": up}, float(lost)


def plain_tensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], base: "Base", rank: int | None = None
) -> dict[str, np.ndarray]:
    """The tensors of a file with every layer of LoHa, LoKr or DoRA as factors of the best LoRA of
    this rank (None: `other_kinds.DEFAULT_RANK`); what that loses is said on stderr.

    `base` is a `BaseModel` or a StableDiffusion. Raises UserError for layers it has not, and for
    tensors that do not fit them.
    """
    groups = keys.other_layers(tensors)
    if not groups:
        return dict(tensors)
    layers = layers_per_block_of(base)
    paths = {stem: keys.canonical_path(stem, layers) for stem in groups}
    stems = {site: stem for stem, site in paths.items() if site is not None}
    result = {key: tensors[key] for key in tensors
              if key not in {k for group in groups.values() for k in group.values()}}  # fmt: skip
    errors: dict[str, float] = {}
    for site, weight in _base_weights(base, set(stems)):
        stem = stems[site]
        parts = {part: tensors[key] for part, key in groups[stem].items()}
        change = _change(f"{path}: layer {site}", parts, groups[stem], np.asarray(weight))
        pair, errors[site] = _truncated(
            change, _site_of(site, change, rank or other_kinds.DEFAULT_RANK)
        )
        ones = (1, 1) if change.ndim == 4 else ()
        down = pair["down"].transpose(range(change.ndim)[::-1] if not ones else (3, 2, 0, 1))
        result[f"{stem}.lora_down.weight"] = down.astype(np.float32)
        result[f"{stem}.lora_up.weight"] = pair["up"].T.reshape(-1, len(down), *ones).astype("f4")
    if missing := [stem for stem, site in paths.items() if site not in errors]:
        raise UserError(f"{path}: LoRA of another base: it has no layer for {missing[0]!r}")
    worst = max(errors, key=errors.__getitem__)
    kinds = " and ".join(sorted({keys.other_kind(group) for group in groups.values()}))
    print(
        f"note: {path}: {kinds} of {len(groups)} layers became a LoRA of rank "
        f"{rank or other_kinds.DEFAULT_RANK}; relative error of the change: mean "
        f"{np.mean(list(errors.values())):.2%}, worst {errors[worst]:.2%} ({worst})",
        file=sys.stderr,
    )
    return result


def _change(
    where: str, parts: dict[str, np.ndarray], names: Mapping[str, str], weight: np.ndarray
) -> np.ndarray:
    """The change of a weight, its alpha or scale honoured."""
    scale = None
    for role in ("alpha", "scale"):  # the latter comes from an adapter's config
        if (given := parts.pop(role, None)) is not None:
            number = float(given.reshape(-1)[0]) if given.size == 1 else math.nan
            if not math.isfinite(number) or number == 0:
                raise UserError(f"{where}: {role} is {given.tolist()!r}, expected a number")
            rank = other_kinds.rank_of(parts)
            scale = number if role == "scale" else None if rank is None else number / rank
    if "magnitude" in parts and "lora_magnitude_vector" in names["magnitude"]:
        parts["magnitude"] = parts["magnitude"].reshape(-1)  # PEFT's: [out] or [1, out, 1, 1]
    try:
        change = other_kinds.delta(parts, scale, weight.astype(np.float64))
    except (KeyError, ValueError, IndexError, TypeError) as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in sorted(parts.items()))
        raise UserError(
            f"{where}: {shapes} do not make a change of its weight {list(weight.shape)}"
        ) from error
    if not np.isfinite(change).all():
        raise UserError(f"{where} has NaN or Inf")
    return change


def _site_of(path: str, change: np.ndarray, rank: int) -> LoraSite:
    out_features, in_features, *window = change.shape
    rank = min(rank, change[0].size, out_features)
    kind, size = ("conv", (window[0], window[1])) if window else ("linear", (1, 1))
    return LoraSite(path, in_features, out_features, rank, kind, size)


def _base_weights(base: "Base", paths: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(site path, weight in PyTorch's layout) of the base's layers among the wanted."""
    by_component: dict[str, set[str]] = {}
    for path in paths:
        head = path.partition(".")[0]
        by_component.setdefault(head if head in TEXT_ENCODERS else "unet", set()).add(path)
    for component, wanted in sorted(by_component.items()):
        if isinstance(base, BaseModel):
            folder = Path(base_path(base.name))
            if (folder / component).exists():
                yield from _weights(folder, component, wanted)
            continue
        for path in sorted(wanted):
            node = base.params.get(component, {})
            inner = path if component == "unet" else path.removeprefix(f"{component}.")
            for name in module_path(inner):
                node = node.get(name, {})
            if (kernel := node.get("kernel")) is not None:
                yield (
                    path,
                    np.asarray(kernel).transpose((1, 0) if kernel.ndim == 2 else (3, 2, 0, 1)),
                )


def _weights(folder: Path, component: str, paths: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(site path, view of its weight) of the wanted layers."""
    for file, names in tensor_files(folder / component, component):
        tensors = read_weights(file)[0]
        for path, key in names.items():
            if path in paths:
                yield path, tensors[key]


def merge_into_checkpoint(base: str | Path, lora: Lora, out: str | Path) -> Path:
    """Copy of a diffusers directory with the deltas added to its weights.

    Dtypes and files stay as they are, but for PyTorch files, which become .safetensors. Further
    variants of the components that change (fp16 beside full precision, say) are left out.

    Raises UserError when `out` exists or a site has no layer.
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
    others = [f for name in components for f in unused_weights(source / name, weights)]
    if others:
        names = ", ".join(str(file.relative_to(source)) for file in others)
        print(f"note: {target}: without the LoRA, so left out: {names}", file=sys.stderr)
    skipped = {str(file) for file in (*weights, *others)}
    shutil.copytree(
        source,
        temporary,
        ignore=lambda folder, names: [n for n in names if str(Path(folder) / n) in skipped],
    )
    for component in sorted(components):
        for file, names in tensor_files(source / component, component):
            new = (temporary / file.relative_to(source)).with_suffix(".safetensors")
            new = new.with_name(_as_safetensors(new.name))
            _merge_file(file, new, names, tree, spec)
        for index in (temporary / component).glob("*.bin.index*.json"):  # of shards in PyTorch form
            new = index.with_name(_as_safetensors(index.name).replace(".bin.", ".safetensors."))
            text = index.read_text("utf-8")
            index.unlink()
            new.write_text(
                _SHARD.sub(lambda m: f'"{_as_safetensors(m[1])}.safetensors"', text), "utf-8"
            )
    temporary.replace(target)
    return target


_SHARD = re.compile(r'"([^"/]+)\.bin"')


def _as_safetensors(name: str) -> str:
    return re.sub("^pytorch_model", "model", name)


def _merge_file(file: Path, out: Path, names: dict[str, str], tree: Params, spec: LoraSpec) -> None:
    tensors, metadata = read_weights(file)
    paths = {key: path for path, key in names.items() if path in spec.by_path}

    def changed(key: str) -> np.ndarray:
        weight = tensors[key]
        if key not in paths:
            return weight
        site = spec.by_path[paths[key]]
        pair = site_factors(tree, site)
        down = np.asarray(pair["down"], np.float32).reshape(site.fan_in, site.rank)
        delta = down @ np.asarray(pair["up"], np.float32)
        if weight.ndim == 2:
            delta = delta.T
        else:
            window = (*weight.shape[2:], weight.shape[1], weight.shape[0])
            delta = delta.reshape(window).transpose(3, 2, 0, 1)
        return (weight.astype(np.float32) + delta).astype(weight.dtype)

    safetensors_io.write_streamed(out, tensors, changed, metadata)
