"""`save_lora`: a LoRA tree as a file that other programs load unchanged.

Normal form of every format: the scale folded into the up factor, convolution factors 4-D, both
factors balanced by a power of two (exact), arrays contiguous, all numbers finite, every site at its
own rank, cut where that is above both widths of the layer (which changes nothing). kohya files
carry one alpha, the largest rank, on every module (diffusers misreads alphas that differ), and up
factors divided by what that makes of a smaller rank; the others no alpha.

All numbers of a LoRA are laid out in one vector first, the down factors before the up factors, so
that a check or a cast is one pass over memory and not one call for each layer.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import ml_dtypes
import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import Bool, Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec, ordered_factors, validate
from hyperlora_jax.lora_files import header, keys, peft_directory, safetensors_io
from hyperlora_jax.lora_files import header as families
from hyperlora_jax.lora_files.peft_directory import W2W_SCALE

DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_LIMITS = {dtype: float(ml_dtypes.finfo(dtype).max) for dtype in DTYPES.values()}
Matrices = dict[str, tuple[np.ndarray, np.ndarray]]


def normal_form(
    lora: Params,
    spec: LoraSpec,
    dtype: str = "float32",
    balance: bool = True,
    scales: Sequence[float] = (),
) -> Matrices:
    """{path: (A [r, in, (kh, kw)], B [out, r, (1, 1)])} in PyTorch layout, balanced.

    B of every site is divided by its scale, which the file then carries itself. The matrices are
    contiguous and share their memory. Raises UserError naming the site for what no file can carry.
    """
    pairs = ordered_factors(lora, spec)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; expected one of {sorted(DTYPES)}")
    packing = _packing(spec)
    if pairs[0][1].ndim == 3:
        raise ValueError("save_lora takes one LoRA, got a batch: use save_loras")
    import jax

    vector = _packed(jax.device_get(pairs), spec, packing)
    peaks = _peaks(vector, packing)
    if (bad := _first(~np.isfinite(peaks))) is not None:
        raise UserError(f"LoRA site {spec.sites[bad].path} has NaN or Inf; nothing was written")
    if balance:
        peaks = _balance(vector, peaks, packing)
    starts = packing.starts[len(spec) :]
    for k, scale in enumerate(scales):
        if scale != 1:
            up = vector[starts[k] : starts[k + 1]]
            up[...] = _divided(up, np.float32(scale))
            peaks[1, k] = np.abs(up).max()
    if (bad := _first(peaks > _LIMITS[DTYPES[dtype]])) is not None:
        path = spec.sites[bad].path
        raise UserError(f"LoRA site {path} overflows {dtype}; write float32 instead")
    parts = _parts(vector.astype(DTYPES[dtype], copy=False), packing)
    downs, ups = parts[: len(spec)], parts[len(spec) :]
    return {site.path: (a, b) for site, a, b in zip(spec.sites, downs, ups, strict=True)}


@dataclasses.dataclass(frozen=True)
class _Packing:
    """Bounds [2n + 1] and shapes [2n] of the matrices in the vector: A of every site, then B."""

    starts: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


@functools.lru_cache(maxsize=64)
def _packing(spec: LoraSpec) -> _Packing:
    if not spec.sites:
        raise UserError("LoRA has no sites; nothing to write")
    if bad := [site.path for site in spec.sites if not keys.is_layer(site.path)]:
        raise UserError(
            f"LoRA site {bad[0]} is no layer of a Stable Diffusion UNet or text encoder that LoRA "
            f"files name ({len(bad)} such sites)"
        )
    downs, ups = [], []
    for site in spec.sites:
        window = site.kernel_size if site.kind == "conv" else ()
        downs.append((site.rank, site.in_features, *window))
        ups.append((site.out_features, site.rank, *(1 for _ in window)))
    shapes = (*downs, *ups)
    return _Packing((0, *itertools.accumulate(map(math.prod, shapes))), shapes)


def _parts(vector: Float[np.ndarray, " d"], packing: _Packing) -> list[np.ndarray]:
    bounds = zip(itertools.pairwise(packing.starts), packing.shapes, strict=True)
    return [vector[start:stop].reshape(shape) for (start, stop), shape in bounds]


def _packed(
    pairs: list[tuple[np.ndarray, np.ndarray]], spec: LoraSpec, packing: _Packing
) -> Float[np.ndarray, " d"]:
    vector = np.empty(packing.starts[-1], np.float32)
    parts = _parts(vector, packing)
    rows = zip(spec.sites, pairs, parts[: len(spec)], parts[len(spec) :], strict=True)
    for site, (down, up), a, b in rows:
        a[...] = down.T if site.kind == "linear" else down.transpose(3, 2, 0, 1)
        b.reshape(b.shape[:2])[...] = up.T
    return vector


def _peaks(vector: Float[np.ndarray, " d"], packing: _Packing) -> Float[np.ndarray, "2 n"]:
    """Largest magnitudes of A and B of every site; NaN where there is one."""
    starts = packing.starts[:-1]
    highest, lowest = np.maximum.reduceat(vector, starts), np.minimum.reduceat(vector, starts)
    return np.maximum(highest, -lowest).reshape(2, -1)


def _first(sites: Bool[np.ndarray, "2 n"]) -> int | None:
    """Number of the first site that is marked on either side."""
    places = np.flatnonzero(sites.any(axis=0))
    return int(places[0]) if places.size else None


def _balance(
    vector: Float[np.ndarray, " d"], peaks: Float[np.ndarray, "2 n"], packing: _Packing
) -> Float[np.ndarray, "2 n"]:
    """Gives A and B of a site peaks of one size, in place, by a power of two; the new peaks."""
    logs = np.log2(peaks, where=peaks > 0, out=np.zeros(peaks.shape))
    imbalance = np.where((peaks > 0).all(axis=0), (logs[1] - logs[0]) / 2, 0)
    # Within 2^±1.5 nothing moves, so that rewriting a rounded file changes no byte.
    power = np.where(np.abs(imbalance) > 0.75, np.round(imbalance), 0).astype(np.int32)
    powers = np.stack([power, -power])
    for k in np.flatnonzero(powers):
        part = vector[packing.starts[k] : packing.starts[k + 1]]
        np.ldexp(part, powers.flat[k], out=part)
    return np.ldexp(peaks, powers)


def _divided(up: Float[np.ndarray, " n"], scale: np.float32) -> Float[np.ndarray, " n"]:
    """up / scale, nudged by at most an ulp to what reading and dividing again leaves alone."""
    result = up / scale
    for _ in range(4):
        again = (result * scale) / scale
        if np.array_equal(again, result):
            break
        result = again
    return result


Format = Literal["kohya", "diffusers", "peft", "weights2weights"]
FORMATS: tuple[Format, ...] = get_args(Format)
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
_KOHYA_TEXT = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",) * 2}
__all__ = ["DTYPES", "FORMATS", "Format", "save_lora", "save_loras"]


def save_lora(
    path: str | os.PathLike[str],
    lora: Params,
    spec: LoraSpec,
    format: str = "kohya",
    dtype: str = "float16",
    family: str | None = None,
    metadata: Mapping[str, object] | None = None,
    layers_per_block: int = 2,
) -> Path | epath.Path:
    """Writes one LoRA (no leading axis), on the disk or in a bucket, and returns the path of the
    file.

    `family` ("sd1", "sd2", "sdxl") decides names and header; None recognises it from the sites.
    `metadata` is stored under "hyperlora.*". A file gets `.safetensors` where its name does not end
    so. For "diffusers" a path without suffix is a folder
    that gets `pytorch_lora_weights.safetensors`; "peft" and "weights2weights" always write a
    folder. `layers_per_block` matters only for SDXL names.
    Raises UserError naming the site for NaN, Inf and values that overflow the dtype.
    """
    if storage.is_remote(path):
        with storage.output(path) as local:
            written = save_lora(
                local, lora, spec, format, dtype, family, metadata, layers_per_block
            )
            return epath.Path(str(path)).parent / written.relative_to(local.parent)
    if format not in FORMATS:
        raise UserError(f"LoRA format {format!r} is unknown; expected one of {list(FORMATS)}")
    from hyperlora_jax.lora import gauge  # JAX: reading does without

    lora, spec = gauge.cut_above_width(lora, spec)
    scales: list[float] = []
    if format == "kohya":
        scales = [spec.max_rank / site.rank for site in spec.sites]
    elif format == "weights2weights":
        if spec != (whole := spec.with_rank(spec.max_rank)):
            lora, spec = gauge.pad_rank(lora, spec.max_rank), whole
        scales = [float(W2W_SCALE)] * len(spec)
    # A weights2weights vector comes back bit for bit: nothing is balanced there.
    sites = normal_form(lora, spec, dtype, balance=format != "weights2weights", scales=scales)
    kind = families.check(family, spec)
    target = Path(path)
    texts = header.build(spec, kind, metadata, format == "kohya")
    if format == "peft":
        return peft_directory.write_peft(target, sites, spec, texts)
    if format == "weights2weights":
        return peft_directory.write_weights2weights(target, sites, spec, texts)
    if format == "diffusers":
        target = _suffixed(target) if target.suffix else target / DIFFUSERS_NAME
        tensors = diffusers_tensors(sites)
    else:
        target = _suffixed(target)
        tensors = kohya_tensors(sites, spec, kind, layers_per_block)
    safetensors_io.write(target, tensors, texts)
    return target


def _suffixed(path: Path) -> Path:
    """With `.safetensors` at the end: other programs list nothing else."""
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def save_loras(  # noqa: PLR0913
    paths: Sequence[str | os.PathLike[str]],
    loras: Params,
    spec: LoraSpec,
    format: str = "kohya",
    dtype: str = "float16",
    family: str | None = None,
    metadata: Sequence[Mapping[str, object] | None] | None = None,
    layers_per_block: int = 2,
    num_workers: int | None = None,
) -> list[Path | epath.Path]:
    """Writes a batch (leading axis l) to l paths, several at a time; returns the files' paths.

    `metadata` has an entry for each file; `num_workers` None means `default_workers()`. The rest
    is as in `save_lora`, whose errors it raises; files that are done by then stay.
    """
    import jax

    from hyperlora_jax.lora import factors

    validate(loras, spec)
    found = factors.num_loras(loras)
    texts = [None] * len(paths) if metadata is None else list(metadata)
    if not found == len(paths) == len(texts):
        raise UserError(
            f"save_loras: {len(paths)} paths and {len(texts)} metadata for {found} LoRAs; "
            "expected one for each"
        )
    if len({os.fspath(path) for path in paths}) < len(paths):
        raise UserError("save_loras: a path is given twice, expected another one for each LoRA")
    host = jax.device_get(loras)

    def write(i: int) -> Path | epath.Path:
        lora = factors.index(host, i)
        return save_lora(paths[i], lora, spec, format, dtype, family, texts[i], layers_per_block)

    with ThreadPoolExecutor(num_workers or default_workers()) as pool:
        return list(pool.map(write, range(len(paths))))


def default_workers() -> int:
    """Files at a time: two for each core, because half of them wait for the disk in fsync."""
    return 2 * len(os.sched_getaffinity(0))


def diffusers_tensors(sites: Matrices) -> dict[str, np.ndarray]:
    """Keys of diffusers' `load_lora_weights`: "unet." or "text_encoder." + path + lora_A/lora_B."""
    tensors = {}
    for path, (a, b) in sites.items():
        name = diffusers_name(path)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    return tensors


def diffusers_name(path: str) -> str:
    """A layer of a UNet or text encoder as a part of diffusers' pipeline."""
    return path if path.startswith("text_encoder") else f"unet.{path}"


def kohya_tensors(
    sites: Matrices, spec: LoraSpec, family: families.Family, layers_per_block: int = 2
) -> dict[str, np.ndarray]:
    """kohya keys with one alpha on every module; diffusers names for SD, sgm names for SDXL."""
    alpha = np.array(spec.max_rank, np.float32)
    names = kohya_names(spec, family, layers_per_block)
    tensors = {}
    for path, (a, b) in sites.items():
        name = names[path]
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a, b
        tensors[f"{name}.alpha"] = alpha
    return tensors


@functools.lru_cache(maxsize=64)
def kohya_names(
    spec: LoraSpec, family: families.Family, layers_per_block: int
) -> Mapping[str, str]:
    """{path: module name in a kohya file, e.g. "lora_unet_mid_block_attentions_0_proj_in"}."""
    return {
        site.path: _kohya_name(site.path, site.component, family, layers_per_block)
        for site in spec.sites
    }


def _kohya_name(path: str, component: str, family: families.Family, layers_per_block: int) -> str:
    if component in _KOHYA_TEXT:
        prefix = _KOHYA_TEXT[component][family == "sdxl"]
        return prefix + path.split(".", 1)[1].replace(".", "_")
    if family == "sdxl":
        ldm = keys.to_ldm(path, layers_per_block)
        if ldm is None:
            raise UserError(f"LoRA site {path} has no name in SDXL's kohya files")
        path = ldm
    return "lora_unet_" + path.replace(".", "_")
