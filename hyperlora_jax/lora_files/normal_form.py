"""A LoRA's factors as files hold them: PyTorch layout, balanced, finite, in a dtype.

All numbers of a LoRA are laid out in one vector first, the down factors before the up factors, so
that a check or a cast is one pass over memory and not one call for each layer.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import ml_dtypes
import numpy as np

from hyperlora_jax.array_types import Bool, Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec, ordered_factors
from hyperlora_jax.lora_files import keys

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
    found = np.flatnonzero(sites.any(axis=0))
    return int(found[0]) if found.size else None


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
