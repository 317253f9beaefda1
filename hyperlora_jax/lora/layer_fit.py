"""A LoRA on the layers that it is for: compared with them, and in the form that they want.

Files of other programs hold factors of another number of dimensions than the layer's, or of
another rank. `path` is the file that an error names.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors, tree_from_sites


def on_layers(
    path: str | os.PathLike[str],
    lora: Params,
    spec: LoraSpec,
    table: Mapping[str, LoraSite],
    whose: str,
) -> tuple[Params, LoraSpec]:
    """Every site compared with the table; 1×1 factors take the kind of the base's layer.

    Raises UserError for a layer that `whose` table lacks, or has in another size.
    """
    pairs, sites = {}, []
    for site in spec.sites:
        other = table.get(site.path)
        if other is None:
            raise UserError(
                f"{path}: LoRA of another base: {whose} has no layer {site.path} "
                f"({site.in_features}→{site.out_features} in the file)"
            )
        ours = (other.in_features, other.out_features, other.kernel_size)
        if (site.in_features, site.out_features, site.kernel_size) != ours:
            raise UserError(
                f"{path}: LoRA of another base: layer {site.path} is {_size(site)} in the file, "
                f"{_size(other)} in {whose}"
            )
        pair = site_factors(lora, site)
        new = dataclasses.replace(site, kind=other.kind, stride=other.stride)
        pairs[site.path] = {"down": pair["down"].reshape(new.down_shape), "up": pair["up"]}
        sites.append(new)
    return tree_from_sites(pairs), LoraSpec(tuple(sites))


def on_spec(
    path: str | os.PathLike[str], lora: Params, spec: LoraSpec, wanted: LoraSpec
) -> tuple[Params, LoraSpec]:
    """The LoRA with the ranks of a spec, whose layers it must have. Raises UserError where not."""
    ours, theirs = wanted.by_path, spec.by_path
    if missing := sorted(set(ours) - set(theirs)):
        raise UserError(
            f"{path}: LoRA of another base or preset: it has {len(theirs)} sites "
            f"(spec {spec.fingerprint[:12]}…), expected {len(ours)} "
            f"(spec {wanted.fingerprint[:12]}…); lacks {missing[0]}"
        )
    lora, spec = on_layers(path, lora, spec, ours, "the expected spec")
    pairs = {}
    for site in wanted.sites:
        pairs[site.path] = _with_rank(path, site_factors(lora, site), spec.by_path[site.path], site)
    return tree_from_sites(pairs), wanted


_WINDOWS = re.compile(r"\.resnets\.\d+\.conv[12]$|\.(down|up)samplers\.\d+\.conv$|^conv_(in|out)$")
_PROJECTION = re.compile(r"\.attentions\.\d+\.proj_(in|out)$")


def of_family(
    path: str | os.PathLike[str], lora: Params, spec: LoraSpec, family: str
) -> tuple[Params, LoraSpec]:
    """The LoRA with the kinds of layers that bases of its family have: files of some trainers hold
    factors of 3×3 windows 2-D, or those of linear layers 4-D, which loaders refuse.

    Raises UserError for a factor that no such layer can have.
    """
    table = {}
    for site in spec.sites:
        other = site
        if _WINDOWS.search(site.path) and site.kind == "linear":
            if site.in_features % 9:
                raise UserError(
                    f"{path}: layer {site.path} has {site.in_features} columns, expected those of "
                    "a 3×3 window (a multiple of 9)"
                )
            window = {"in_features": site.in_features // 9, "kernel_size": (3, 3)}
            other = dataclasses.replace(site, kind="conv", **window)
        elif not _WINDOWS.search(site.path):
            wide = site.path.endswith(".conv_shortcut")
            wide |= family == "sd1" and bool(_PROJECTION.search(site.path))
            if site.kernel_size != (1, 1):
                raise UserError(
                    f"{path}: layer {site.path} is {_size(site)}, expected a layer without window"
                )
            other = dataclasses.replace(site, kind="conv" if wide else "linear")
        table[site.path] = other
    if all(table[site.path] == site for site in spec.sites):
        return lora, spec
    pairs = {}
    for site in spec.sites:
        pair, other = site_factors(lora, site), table[site.path]
        down = pair["down"]
        if other.kernel_size != site.kernel_size:  # PyTorch's order: input, then the window
            down = down.reshape(other.in_features, 3, 3, site.rank).transpose(1, 2, 0, 3)
        pairs[site.path] = {"down": down.reshape(other.down_shape), "up": pair["up"]}
    return tree_from_sites(pairs), LoraSpec(tuple(table[site.path] for site in spec.sites))


def _size(site: LoraSite) -> str:
    window = f", window {site.kernel_size[0]}×{site.kernel_size[1]}" if site.kind == "conv" else ""
    return f"{site.in_features}→{site.out_features}{window}"


def _with_rank(
    path: str | os.PathLike[str], pair: Params, site: LoraSite, wanted: LoraSite
) -> Params:
    """Zero-pads to the wanted rank, or cuts components that are zero."""
    down, up, rank = pair["down"], pair["up"], wanted.rank
    if site.rank > rank:
        if np.any(down[..., rank:]) and np.any(up[rank:]):
            raise UserError(f"{path}: layer {site.path} has rank {site.rank}, expected {rank}")
        return {"down": down[..., :rank], "up": up[:rank]}
    more = rank - site.rank
    return {
        "down": np.pad(down, [(0, 0)] * (down.ndim - 1) + [(0, more)]),
        "up": np.pad(up, [(0, more), (0, 0)]),
    }
