"""`load_lora`: any LoRA file of a Stable Diffusion UNet and its text encoders -> folded tree, spec.

Every key must be understood: a kind that is no plain LoRA, an unknown module, a missing half, a
shape that does not fit or a number that is not finite is an error with the file's name in it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, tree_from_sites
from hyperlora_jax.lora_files import keys, safetensors_io
from hyperlora_jax.lora_files.base_check import check_base, layers_per_block_of
from hyperlora_jax.lora_files.peft_directory import (
    WEIGHTS_NAME,
    adapter_folders,
    header_scales,
    read_folder,
    read_vector,
)
from hyperlora_jax.lora_files.writing import DIFFUSERS_NAME

_FLOATS = {safetensors_io.DTYPES[name] for name in ("F16", "BF16", "F32", "F64")}
Groups = dict[str, dict[str, np.ndarray]]


def load_lora(path: str | os.PathLike[str], base: Any = None) -> tuple[Params, LoraSpec]:
    """(LoRA tree of float32 numpy arrays, its spec). Folded: alpha is multiplied into up.

    `path` is a .safetensors file, a PEFT or diffusers folder, or a weights2weights vector (.npy,
    which needs a LoraSpec). `base` None reads by names alone; a StableDiffusion, a LoraSpec or a
    `BaseModel` is checked against the file: another base raises UserError that names both sides.
    """
    tensors, metadata = read_tensors(Path(path), base if isinstance(base, LoraSpec) else None)
    sites = read_sites(path, tensors, layers_per_block_of(base))
    lora, spec = fold(path, sites)
    written = metadata.get(safetensors_io.OWN_MARK)
    # One folder of an adapter directory carries the fingerprint of the whole.
    single = not (Path(path).is_dir() and adapter_folders(Path(path)))
    if single and written is not None and written != spec.fingerprint:
        raise UserError(
            f"{path}: damaged or of another block layout: its names give spec "
            f"{spec.fingerprint[:12]}…, its header says {written[:12]}…"
        )
    return check_base(path, lora, spec, metadata, base)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header's texts of a LoRA file or folder ("hyperlora.*", "ss_*", …)."""
    path = Path(path)
    folders = adapter_folders(path) if path.is_dir() else {}
    if folders:
        return safetensors_io.read_metadata(next(iter(folders.values())) / WEIGHTS_NAME)
    return safetensors_io.read_metadata(_file(path))


def read_tensors(
    path: Path, spec: LoraSpec | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors with the scales of adapter configs put in as ".scale", header texts)."""
    if path.suffix == ".npy":
        if spec is None:
            raise UserError(f"{path}: a vector has no names; a LoraSpec is needed to read it")
        return read_vector(path, spec), {}
    folders = adapter_folders(path) if path.is_dir() else {}
    if folders:
        tensors: dict[str, np.ndarray] = {}
        metadata: dict[str, str] = {}
        for component, folder in folders.items():
            part, texts = read_folder(folder, component)
            tensors |= part
            metadata |= texts
        return tensors, metadata
    tensors, metadata = safetensors_io.read(_file(path))
    if text := metadata.get("lora_adapter_metadata"):
        tensors |= header_scales(path, tensors, text)
    return tensors, metadata


def _file(path: Path) -> Path:
    if path.is_dir():
        if not (path / DIFFUSERS_NAME).exists():
            raise UserError(
                f"{path}: a folder without {DIFFUSERS_NAME} or {WEIGHTS_NAME}, expected a LoRA"
            )
        return path / DIFFUSERS_NAME
    if not path.exists():
        raise UserError(f"{path}: no such file, expected a LoRA (.safetensors)")
    return path


def read_sites(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], layers_per_block: int = 2
) -> Groups:
    """{diffusers path: {"down", "up", maybe "alpha" or "scale"}} as the file stores them."""
    if not tensors:
        raise UserError(f"{path}: holds no tensors, expected a LoRA")
    groups: Groups = {}
    stems: dict[str, str] = {}
    unknown: list[str] = []
    for key, array in tensors.items():
        found = keys.split_role(key)
        if found is None:
            unknown.append(key)
            continue
        stem, role = found
        if role not in keys.PLAIN:
            raise UserError(f"{path}: {role} is not supported, only plain LoRA is (key {key!r})")
        site = keys.canonical_path(stem, layers_per_block)
        if site is None:
            unknown.append(key)
            continue
        if stems.setdefault(site, stem) != stem:
            raise UserError(f"{path}: {stems[site]!r} and {stem!r} both name the layer {site}")
        if role in groups.setdefault(site, {}):
            raise UserError(f"{path}: layer {site} has two tensors for its {role} (key {key!r})")
        groups[site][role] = array
    if unknown:
        raise UserError(_unknown_message(path, unknown, len(tensors)))
    for site, group in groups.items():
        if missing := {"down", "up"} - set(group):
            raise UserError(f"{path}: layer {site} lacks its {min(missing)} factor")
    return groups


def _unknown_message(path: str | os.PathLike[str], unknown: list[str], total: int) -> str:
    shown = repr(unknown[0][:120])
    if any(keys.TRANSFORMER_ONLY.search(key) for key in unknown):
        kind = "a LoRA of a diffusion transformer (Flux, SD3, …), expected Stable Diffusion 1/2/XL"
        return f"{path}: {kind} (key {shown})"
    if len(unknown) == total:
        return f"{path}: no key belongs to a Stable Diffusion LoRA (first {shown})"
    return f"{path}: {len(unknown)} of {total} keys are not understood, first {shown}"


def fold(path: str | os.PathLike[str], groups: Groups) -> tuple[Params, LoraSpec]:
    """Folded LoRA tree and spec of stored factors. Raises UserError on shapes that do not fit."""
    pairs, sites = {}, []
    for name in sorted(groups):
        site = _site(path, name, groups[name])
        pairs[name] = _folded(path, site, groups[name])
        sites.append(site)
    return tree_from_sites(pairs), LoraSpec(tuple(sites))


def _site(path: str | os.PathLike[str], name: str, group: dict[str, np.ndarray]) -> LoraSite:
    down, up = group["down"], group["up"]
    shapes = f"down {list(down.shape)}, up {list(up.shape)}"
    if down.ndim not in (2, 4) or up.ndim != down.ndim or 0 in down.shape or 0 in up.shape:
        raise UserError(f"{path}: layer {name} has {shapes}, expected two 2-D or two 4-D factors")
    rank, in_features = down.shape[:2]
    out_features = up.shape[0]
    if up.shape[1] != rank or any(size != 1 for size in up.shape[2:]):
        raise UserError(f"{path}: layer {name} has {shapes}: the ranks differ (swapped factors?)")
    window = down.shape[2:] if down.ndim == 4 else (1, 1)
    if rank > max(in_features * window[0] * window[1], out_features):
        raise UserError(
            f"{path}: layer {name} has {shapes}: rank {rank} is above both sizes (swapped factors?)"
        )
    kind = "linear" if down.ndim == 2 else "conv"
    stride = (2, 2) if ".downsamplers." in name else (1, 1)
    return LoraSite(name, in_features, out_features, rank, kind, (window[0], window[1]), stride)


def _number(path: str | os.PathLike[str], name: str, role: str, array: np.ndarray) -> float:
    if array.size != 1 or not np.isfinite(value := float(array.reshape(-1)[0])):
        raise UserError(f"{path}: {role} of layer {name} is {array.tolist()!r}, expected a number")
    if value == 0:
        raise UserError(f"{path}: {role} of layer {name} is 0, which tools read as off or as 1")
    return value


def _folded(
    path: str | os.PathLike[str], site: LoraSite, group: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    for role in ("down", "up"):
        if group[role].dtype not in _FLOATS:
            raise UserError(
                f"{path}: {role} of layer {site.path} has dtype {group[role].dtype}, expected "
                "float16, bfloat16, float32 or float64"
            )
    factor = 1.0
    if "scale" in group:
        factor = _number(path, site.path, "scale", group["scale"])
    elif "alpha" in group:
        factor = _number(path, site.path, "alpha", group["alpha"]) / site.rank
    with np.errstate(over="ignore", invalid="ignore"):
        order = (1, 0) if site.kind == "linear" else (2, 3, 1, 0)
        # Converted in the order of the file (fast), then turned as views. Always copies: nothing
        # returned refers to the file.
        down = group["down"].astype(np.float32).transpose(order)
        up = group["up"].astype(np.float32).reshape(site.out_features, site.rank).T
        if factor != 1.0:
            up *= np.float32(factor)
        total = sum(float(side.max()) - float(side.min()) for side in (down, up))
    if not np.isfinite(total):
        raise UserError(f"{path}: layer {site.path} has NaN or Inf, or overflows float32")
    return {"down": down, "up": up}
