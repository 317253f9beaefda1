"""`save_lora`: a LoRA tree as a file that other programs load unchanged.

Normal form of every format: the scale folded into the up factor, convolution factors 4-D, both
factors balanced by a power of two (exact), arrays contiguous, all numbers finite, every site at its
own rank, cut where that is above both widths of the layer (which changes nothing). kohya files
carry one alpha, the largest rank, on every module (diffusers misreads alphas that differ), and up
factors divided by what that makes of a smaller rank; the others no alpha.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors, gauge
from hyperlora_jax.lora.sites import LoraSpec, validate
from hyperlora_jax.lora_files import family as families
from hyperlora_jax.lora_files import header, keys, peft_directory, safetensors_io
from hyperlora_jax.lora_files.normal_form import DTYPES, Matrices, normal_form
from hyperlora_jax.lora_files.peft_directory import W2W_SCALE

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
    metadata: Mapping[str, Any] | None = None,
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
    lora, spec = gauge.cut_above_width(lora, spec)
    scales: list[float] = []
    if format == "kohya":
        scales = [spec.max_rank / site.rank for site in spec.sites]
    elif format == "weights2weights":
        lora, spec = gauge.pad_rank(lora, spec.max_rank), spec.with_rank(spec.max_rank)
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


def save_loras(
    paths: Sequence[str | os.PathLike[str]],
    loras: Params,
    spec: LoraSpec,
    format: str = "kohya",
    dtype: str = "float16",
    family: str | None = None,
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    layers_per_block: int = 2,
    num_workers: int | None = None,
) -> list[Path | epath.Path]:
    """Writes a batch (leading axis l) to l paths, several at a time; returns the files' paths.

    `metadata` has an entry for each file; `num_workers` None means `default_workers()`. The rest
    is as in `save_lora`, whose errors it raises; files that are done by then stay.
    """
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
        name = path if path.startswith("text_encoder") else f"unet.{path}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    return tensors


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
