"""`load_lora`: any LoRA file of a Stable Diffusion UNet and its text encoders -> folded tree, spec.

Every key must be understood: a kind that is no plain LoRA, an unknown module, a missing half, a
shape that does not fit or a number that is not finite is an error with the file's name in it.
"""

import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors, tree_from_sites
from hyperlora_jax.lora_files import keys, safetensors_io
from hyperlora_jax.lora_files.base_files import (
    check_base,
    is_pickled,
    layers_per_block_of,
    read_weights,
)
from hyperlora_jax.lora_files.lora_config import header_scales
from hyperlora_jax.lora_files.peft_directory import (
    WEIGHTS_NAME,
    adapter_folders,
    further_adapters,
    read_folder,
    read_vector,
    weights_of,
)
from hyperlora_jax.lora_files.safetensors_io import Signature, signature
from hyperlora_jax.lora_files.writing import DIFFUSERS_NAME

if TYPE_CHECKING:
    from hyperlora_jax.lora_files.base_files import Base

SWAPPED, NARROWEST = 4, 32
CORE = ".lora_mid.weight"
BUNDLED = "bundle_emb."  # textual inversions that OneTrainer puts into the LoRA file
DROP_DIFFERENCES = "differences"
_FLOATS = {
    safetensors_io.DTYPES[name] for name in ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
}
_BY_NUMBER = re.compile(r"^(unet|text_encoder):\d+:(up|down)$")


class _Differences(UserError):
    """What a file holds beside its factors, that no LoRA carries: `keys`."""

    def __init__(self, keys: Sequence[str]):
        super().__init__(f"differences: {keys}")
        self.keys = keys


def load_lora(
    path: str | os.PathLike[str],
    base: "Base | LoraSpec | None" = None,
    drop: Collection[str] = (),
    rank: int | None = None,
) -> tuple[Params, LoraSpec]:
    """(LoRA tree of float32 numpy arrays, its spec). Folded: alpha is multiplied into up.

    `path` is a .safetensors or PyTorch file, a PEFT or diffusers folder, or a weights2weights
    vector (.npy, which needs a LoraSpec). `base` None reads by names alone; a StableDiffusion, a
    LoraSpec or a `BaseModel` is checked against the file: another base raises UserError that names
    both sides.
    `drop` leaves out "differences" (of biases and norms, beside the factors) and layers, named by
    any whole parts of their paths ("conv_in", "text_encoder"). What is left out is said on stderr.
    With a base that has weights, layers of LoHa, LoKr and DoRA become factors of `rank`.
    """
    tensors, metadata = read_tensors(Path(path), base if isinstance(base, LoraSpec) else None)
    tensors = _without_cores(path, tensors)
    if base is not None and not isinstance(base, LoraSpec):
        from hyperlora_jax.lora_files.algebra import plain_tensors  # JAX

        tensors = plain_tensors(Path(path), tensors, base, rank)
    lora, spec = fold(path, tensors, layers_per_block_of(base), DROP_DIFFERENCES in drop)
    written = metadata.get(safetensors_io.OWN_MARK)
    # One folder of an adapter directory carries the fingerprint of the whole.
    single = not (Path(path).is_dir() and adapter_folders(Path(path)))
    whole = spec
    if layers := [name for name in drop if name != DROP_DIFFERENCES]:
        lora, spec = _without(path, lora, spec, layers)
    if single and written is not None and written != whole.fingerprint:
        raise UserError(
            f"{path}: damaged or of another block layout: its names give spec "
            f"{whole.fingerprint[:12]}…, its header says {written[:12]}…"
        )
    return check_base(path, lora, spec, metadata, base)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header's texts of a LoRA file or folder ("hyperlora.*", "ss_*", …); {} without one."""
    path = Path(path)
    folders = adapter_folders(path) if path.is_dir() else {}
    file = weights_of(next(iter(folders.values()))) if folders else _file(path)
    return {} if file is None or is_pickled(file) else safetensors_io.read_metadata(file)


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
        if others := further_adapters(path):
            _say(path, f"holds further adapters, which are not read: {', '.join(others)}")
        tensors: dict[str, np.ndarray] = {}
        metadata: dict[str, str] = {}
        for component, folder in folders.items():
            part, texts = read_folder(folder, component)
            tensors |= part
            metadata |= texts
        return tensors, metadata
    tensors, metadata = read_weights(_file(path))
    if text := metadata.get("lora_adapter_metadata"):
        tensors |= header_scales(path, tensors, text)
    return tensors, metadata


def _without_cores(
    path: str | os.PathLike[str], tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """LyCORIS' convolutions in Tucker form as plain factors: its core times down is a down."""
    cores = [key for key in tensors if key.endswith(CORE)]
    if not cores:
        return tensors
    result = {key: array for key, array in tensors.items() if not key.endswith(CORE)}
    for key in cores:
        name = key.removesuffix(CORE) + ".lora_down.weight"
        core, down = tensors[key], tensors.get(name, np.empty(0))
        rank = down.shape[0]
        if core.ndim != 4 or core.shape[:2] != (rank, rank) or down.shape[2:] not in ((), (1, 1)):
            raise UserError(
                f"{path}: {key} {list(core.shape)} does not fit the down factor {list(down.shape)}"
            )
        flat = down.reshape(rank, -1).astype(np.float64)
        result[name] = np.einsum("mnhw,ni->mihw", core.astype(np.float64), flat).astype(np.float32)
    return result


def _file(path: Path) -> Path:
    if path.is_dir():
        if (file := weights_of(path, DIFFUSERS_NAME)) is None:
            raise UserError(
                f"{path}: a folder without {DIFFUSERS_NAME} or {WEIGHTS_NAME}, expected a LoRA"
            )
        return file
    if not path.exists():
        raise UserError(f"{path}: no such file, expected a LoRA (.safetensors)")
    return path


def fold(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    layers_per_block: int = 2,
    drop_differences: bool = False,
) -> tuple[Params, LoraSpec]:
    """Folded LoRA tree and its spec. Raises UserError for what is no sound plain LoRA."""
    try:
        plan = _plan(signature(tensors), layers_per_block)
        lora = _folded(tensors, plan)
    except _Differences as beside:
        plain = {name: array for name, array in tensors.items() if name not in beside.keys}
        lora, spec = fold(path, plain, layers_per_block)
        what = _differences(tensors, beside.keys, lora, spec)
        if not drop_differences:
            raise UserError(
                f"{path}: holds {what}, which no LoRA carries; convert or merge with --drop "
                f"{DROP_DIFFERENCES} leaves them out"
            ) from None
        _say(path, f"left out {what}")
        return lora, spec
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if plan.bundled:
        names = sorted({key.removeprefix(BUNDLED).partition(".")[0] for key in plan.bundled})
        _say(path, f"its {len(names)} bundled embeddings are not read ({', '.join(names)})")
    return lora, plan.spec


def _say(path: str | os.PathLike[str], text: str) -> None:
    print(f"note: {path}: {text}", file=sys.stderr)


def _differences(
    tensors: Mapping[str, np.ndarray], names: Sequence[str], lora: Params, spec: LoraSpec
) -> str:
    """How many differences there are beside the factors, and how much of the change."""
    beside = sum(float(np.square(tensors[name].astype(np.float64)).sum()) for name in names)
    factors = 0.0
    for site in spec.sites:
        pair = site_factors(lora, site)
        down = pair["down"].reshape(-1, site.rank).astype(np.float64)
        factors += float(((down.T @ down) * (pair["up"] @ pair["up"].T.astype(np.float64))).sum())
    share = math.sqrt(beside / max(beside + factors, 1e-300))
    return (
        f"{len(names)} differences of biases, norms or weights beside its factors (first "
        f"{names[0]!r}; {share:.2%} of the norm of the whole change)"
    )


def _without(
    path: str | os.PathLike[str], lora: Params, spec: LoraSpec, drop: Sequence[str]
) -> tuple[Params, LoraSpec]:
    lost = {
        name: {site.path for site in spec.sites if f".{name}." in f".{site.path}."} for name in drop
    }
    gone = set().union(*lost.values())
    rest = LoraSpec(tuple(site for site in spec.sites if site.path not in gone))
    counts = ", ".join(f"{name}: {len(paths)}" for name, paths in lost.items())
    if not rest.sites:
        raise UserError(f"{path}: --drop leaves no layer ({counts})")
    _say(path, f"left out {len(gone)} of {len(spec)} layers ({counts})")
    return tree_from_sites({site.path: site_factors(lora, site) for site in rest.sites}), rest


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sites of a file and the names of their tensors: the same for all files of one kind."""

    spec: LoraSpec
    names: tuple[Mapping[str, str], ...]  # for each site {role: key}
    bundled: tuple[str, ...]


@functools.lru_cache(maxsize=64)
def _plan(tensors: Signature, layers_per_block: int) -> _Plan:
    if not tensors:
        raise UserError("holds no tensors, expected a LoRA")
    groups = _groups([name for name, _, _ in tensors], layers_per_block)
    kinds = {name: (dtype, shape) for name, dtype, shape in tensors}
    sites = [_site(name, groups[name], kinds) for name in sorted(groups)]
    bundled = tuple(name for name in kinds if name.startswith(BUNDLED))
    return _Plan(LoraSpec(tuple(sites)), tuple(groups[site.path] for site in sites), bundled)


def _groups(names: Sequence[str], layers_per_block: int) -> dict[str, dict[str, str]]:
    """{diffusers path: {"down", "up", maybe "alpha" or "scale": key}}."""
    groups: dict[str, dict[str, str]] = {}
    stems: dict[str, str] = {}
    unknown: list[str] = []
    differences: list[str] = []
    for key in names:
        if key.startswith(BUNDLED):
            continue
        named = keys.split_role(key)
        if named is None:
            unknown.append(key)
            continue
        stem, role = named
        if role in keys.DIFFERENCES:
            differences.append(key)
            continue
        if role not in keys.PLAIN:
            hint = ", or LoHa, LoKr and DoRA with a base (--base DIR)" * (role in keys.CONVERTED)
            raise UserError(f"{role} is not supported, only plain LoRA is{hint} (key {key!r})")
        site = keys.canonical_path(stem, layers_per_block)
        if site is None:
            unknown.append(key)
            continue
        if stems.setdefault(site, stem) != stem:
            raise UserError(f"{stems[site]!r} and {stem!r} both name the layer {site}")
        if role in groups.setdefault(site, {}):
            raise UserError(f"layer {site} has two tensors for its {role} (key {key!r})")
        groups[site][role] = key
    if unknown:
        raise UserError(_unknown_message(unknown, len(names)))
    if differences and any("down" in group for group in groups.values()):
        raise _Differences(differences)
    if not groups:
        raise UserError(f"holds no factors of a LoRA (first key {names[0]!r})")
    for site, group in groups.items():
        if missing := {"down", "up"} - set(group):
            raise UserError(f"layer {site} lacks its {min(missing)} factor")
    return groups


def _unknown_message(unknown: list[str], total: int) -> str:
    shown = repr(unknown[0][:120])
    if any(keys.TRANSFORMER_ONLY.search(key) for key in unknown):
        kind = "a LoRA of a diffusion transformer (Flux, SD3, …), expected Stable Diffusion 1/2/XL"
        return f"{kind} (key {shown})"
    if all(_BY_NUMBER.search(key) for key in unknown):
        return f"layers by number ({shown}), as lora_diffusion writes them; their names are needed"
    if len(unknown) == total:
        return f"no key belongs to a Stable Diffusion LoRA (first {shown})"
    return f"{len(unknown)} of {total} keys are not understood, first {shown}"


def _site(
    name: str, group: Mapping[str, str], kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
) -> LoraSite:
    for role in ("down", "up"):
        if (dtype := kinds[group[role]][0]) not in _FLOATS:
            raise UserError(
                f"{role} of layer {name} has dtype {dtype}, expected float8, float16, bfloat16, "
                "float32 or float64"
            )
    down, up = kinds[group["down"]][1], kinds[group["up"]][1]
    shapes = f"down {list(down)}, up {list(up)}"
    # LyCORIS' DyLoRA keeps the up factor of a convolution 2-D.
    if len(down) not in (2, 4) or len(up) not in (2, len(down)) or 0 in down or 0 in up:
        raise UserError(f"layer {name} has {shapes}, expected two 2-D or two 4-D factors")
    rank, in_features = down[:2]
    out_features = up[0]
    if up[1] != rank or any(size != 1 for size in up[2:]):
        raise UserError(f"layer {name} has {shapes}: the ranks differ (swapped factors?)")
    window = down[2:] if len(down) == 4 else (1, 1)
    widest = max(in_features * window[0] * window[1], out_features)
    # A rank above both widths is sound (network_dim 1000 on layers of 320); one far above them, on
    # a layer narrower than any real one, is the width of swapped factors.
    if rank > widest and (rank > SWAPPED * widest or widest < NARROWEST):
        raise UserError(
            f"layer {name} has {shapes}: rank {rank} is above both sizes (swapped factors?)"
        )
    kind = "linear" if len(down) == 2 else "conv"
    stride = (2, 2) if ".downsamplers." in name else (1, 1)
    return LoraSite(name, in_features, out_features, rank, kind, (window[0], window[1]), stride)


def _number(name: str, role: str, array: np.ndarray) -> float:
    if array.size != 1 or not math.isfinite(value := float(array.reshape(-1)[0])):
        raise UserError(f"{role} of layer {name} is {array.tolist()!r}, expected a number")
    if value == 0:
        raise UserError(f"{role} of layer {name} is 0, which tools read as off or as 1")
    return value


def _factor(tensors: Mapping[str, np.ndarray], site: LoraSite, names: Mapping[str, str]) -> float:
    """What the up factor is multiplied by: the scale, else alpha / rank, else 1."""
    if "scale" in names:
        return _number(site.path, "scale", tensors[names["scale"]])
    if "alpha" in names:
        return _number(site.path, "alpha", tensors[names["alpha"]]) / site.rank
    return 1.0


def _folded(tensors: Mapping[str, np.ndarray], plan: _Plan) -> Params:
    """The tree, float32. Its factors share one new vector: nothing refers to the file."""
    vector = np.empty(plan.spec.num_parameters, np.float32)
    pairs, stop = {}, 0
    with np.errstate(over="ignore", invalid="ignore"):
        for site, names in zip(plan.spec.sites, plan.names, strict=True):
            sides = []
            for role in ("down", "up"):
                stored = tensors[names[role]]
                start, stop = stop, stop + stored.size
                # In the order of the file, which is fast; then turned as views.
                vector[start:stop] = stored.reshape(-1)
                sides.append(vector[start:stop].reshape(stored.shape))
            down, up = sides
            up = up.reshape(up.shape[:2]).T
            if (factor := _factor(tensors, site, names)) != 1.0:
                up *= np.float32(factor)
            down = down.T if site.kind == "linear" else down.transpose(2, 3, 1, 0)
            pairs[site.path] = {"down": down, "up": up}
        # NaN stays NaN in both, an infinity is one of them.
        finite = math.isfinite(vector.max()) and math.isfinite(vector.min())
    if not finite:
        bad = next(path for path, pair in pairs.items() if not _is_finite(pair))
        raise UserError(f"layer {bad} has NaN or Inf, or overflows float32")
    return tree_from_sites(pairs)


def _is_finite(pair: Params) -> bool:
    return bool(np.isfinite(pair["down"]).all() and np.isfinite(pair["up"]).all())
