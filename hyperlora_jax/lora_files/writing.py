"""`save_lora`: a LoRA tree as a file that other programs load unchanged.

Normal form of every format: one rank for the whole file (smaller sites are zero-padded), the
scale folded into the up factor, convolution factors 4-D, both factors balanced by a power of two
(exact), arrays contiguous, all numbers finite. kohya files carry alpha = rank on every module,
the others no alpha: the effective scale is 1 for every reader.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import ml_dtypes
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors, validate
from hyperlora_jax.lora_files import family as families
from hyperlora_jax.lora_files import header, keys, peft_directory, safetensors_io
from hyperlora_jax.lora_files.peft_directory import W2W_SCALE

Format = Literal["kohya", "diffusers", "peft", "weights2weights"]
FORMATS: tuple[Format, ...] = get_args(Format)
DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_LIMITS = {dtype: float(ml_dtypes.finfo(dtype).max) for dtype in DTYPES.values()}
CARRIED = re.compile(
    r"(^|\.)(attentions|resnets|downsamplers|upsamplers)\.\d+\.|\.(self_attn|mlp)\.[a-z0-9_]+$"
)
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
_KOHYA_TEXT = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",) * 2}


def save_lora(
    path: str | os.PathLike[str],
    lora: Params,
    spec: LoraSpec,
    format: str = "kohya",
    dtype: str = "float16",
    family: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    layers_per_block: int = 2,
) -> Path:
    """Writes one LoRA (no leading axis) and returns the path of the file.

    `family` ("sd1", "sd2", "sdxl") decides names and header; None recognises it from the sites.
    `metadata` is stored under "hyperlora.*". For "diffusers" a path without suffix is a folder
    that gets `pytorch_lora_weights.safetensors`; "peft" and "weights2weights" always write a
    folder. `layers_per_block` matters only for SDXL names.
    Raises UserError naming the site for NaN, Inf, values that overflow the dtype, a rank above
    both sizes of a layer, and sites that the common tools cannot load (conv_in, conv_out, time and
    add embeddings).
    """
    if format not in FORMATS:
        raise UserError(f"LoRA format {format!r} is unknown; expected one of {list(FORMATS)}")
    # A weights2weights vector comes back bit for bit: nothing is balanced there.
    scale = W2W_SCALE if format == "weights2weights" else 1
    sites = normal_form(lora, spec, dtype, balance=scale == 1, scale=scale)
    spec = spec.with_rank(spec.max_rank)
    kind = families.check(family, spec)
    target = Path(path)
    texts = header.build(spec, kind, metadata, format == "kohya")
    if format == "peft":
        return peft_directory.write_peft(target, sites, spec, texts)
    if format == "weights2weights":
        return peft_directory.write_weights2weights(target, sites, spec, texts)
    if format == "diffusers":
        target = target if target.suffix else target / DIFFUSERS_NAME
        tensors = diffusers_tensors(sites)
    else:
        tensors = kohya_tensors(sites, spec, kind, layers_per_block)
    safetensors_io.write(target, tensors, texts)
    return target


def normal_form(
    lora: Params, spec: LoraSpec, dtype: str = "float32", balance: bool = True, scale: int = 1
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{path: (A [r, in, (kh, kw)], B [out, r, (1, 1)])} in PyTorch layout, padded and balanced.

    B is divided by `scale`, which the file then carries itself.
    """
    validate(lora, spec)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; expected one of {sorted(DTYPES)}")
    if not spec.sites:
        raise UserError("LoRA has no sites; nothing to write")
    if site_factors(lora, spec.sites[0])["up"].ndim == 3:
        raise ValueError("save_lora takes one LoRA, got a batch: use factors.index(lora, i)")
    if bad := [site.path for site in spec.sites if not CARRIED.search(site.path)]:
        raise UserError(
            f"LoRA site {bad[0]} cannot be carried by the common formats and tools ({len(bad)} "
            "such sites): only attention, resnet and sampler layers and text encoder layers can"
        )
    rank = spec.max_rank
    for site in spec.sites:
        if rank > max(site.fan_in, site.out_features):
            raise UserError(
                f"LoRA site {site.path}: rank {rank} is above both its sizes {site.fan_in}→"
                f"{site.out_features}, which readers take for swapped factors; resize the LoRA to "
                f"rank {min(site.fan_in, site.out_features)} or less, which loses nothing there"
            )
    host = jax.device_get(lora)
    return {
        site.path: _site_arrays(site_factors(host, site), site, rank, DTYPES[dtype], balance, scale)
        for site in spec.sites
    }


def _site_arrays(
    pair: Params, site: LoraSite, rank: int, dtype: np.dtype, balance: bool, scale: int
) -> tuple[np.ndarray, np.ndarray]:
    down = np.asarray(pair["down"], np.float32).reshape(site.down_shape)
    up = np.asarray(pair["up"], np.float32)
    peak_down, peak_up = _peak(down), _peak(up)
    if not (np.isfinite(peak_down) and np.isfinite(peak_up)):
        raise UserError(f"LoRA site {site.path} has NaN or Inf; nothing was written")
    if balance and peak_down > 0 and peak_up > 0:
        # Within 2^±1.5 nothing moves, so that rewriting a rounded file changes no byte.
        imbalance = (math.log2(peak_up) - math.log2(peak_down)) / 2
        if abs(imbalance) > 0.75:
            power = round(imbalance)
            down, up = np.ldexp(down, power), np.ldexp(up, -power)
            peak_down, peak_up = _peak(down), _peak(up)
    if scale != 1:
        up = _divided(up, np.float32(scale))
        peak_up = _peak(up)
    if max(peak_down, peak_up) > _LIMITS[dtype]:
        raise UserError(f"LoRA site {site.path} overflows {dtype.name}; write float32 instead")
    down, up = down.astype(dtype, copy=False), up.astype(dtype, copy=False)
    more = rank - site.rank
    down = np.pad(down, [(0, 0)] * (down.ndim - 1) + [(0, more)]) if more else down
    up = np.pad(up, [(0, more), (0, 0)]) if more else up
    order = (1, 0) if site.kind == "linear" else (3, 2, 0, 1)
    b = up.T if site.kind == "linear" else up.T[:, :, None, None]
    return np.ascontiguousarray(down.transpose(order)), np.ascontiguousarray(b)


def _peak(array: np.ndarray) -> float:
    """Largest magnitude; NaN when there is one."""
    return float(np.maximum(array.max(), -array.min()))


def _divided(up: np.ndarray, scale: np.float32) -> np.ndarray:
    """up / scale, nudged by at most an ulp to what reading and dividing again leaves alone."""
    result = up / scale
    for _ in range(4):
        result = (result * scale) / scale
    return result


def diffusers_tensors(sites: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Keys of diffusers' `load_lora_weights`: "unet." or "text_encoder." + path + lora_A/lora_B."""
    tensors = {}
    for path, (a, b) in sites.items():
        name = path if path.startswith("text_encoder") else f"unet.{path}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    return tensors


def kohya_tensors(
    sites: Mapping[str, tuple[np.ndarray, np.ndarray]],
    spec: LoraSpec,
    family: families.Family,
    layers_per_block: int = 2,
) -> dict[str, np.ndarray]:
    """kohya keys with alpha = rank on every module; diffusers names for SD, sgm names for SDXL."""
    alpha = np.array(spec.max_rank, np.float32)
    tensors = {}
    for path, (a, b) in sites.items():
        name = kohya_name(path, spec.by_path[path].component, family, layers_per_block)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a, b
        tensors[f"{name}.alpha"] = alpha
    return tensors


def kohya_name(path: str, component: str, family: families.Family, layers_per_block: int) -> str:
    """Module name of a site in a kohya file, e.g. "lora_unet_mid_block_attentions_0_proj_in"."""
    if component in _KOHYA_TEXT:
        prefix = _KOHYA_TEXT[component][family == "sdxl"]
        return prefix + path.split(".", 1)[1].replace(".", "_")
    if family == "sdxl":
        ldm = keys.to_ldm(path, layers_per_block)
        if ldm is None:
            raise UserError(f"LoRA site {path} has no name in SDXL's kohya files")
        path = ldm
    return "lora_unet_" + path.replace(".", "_")
