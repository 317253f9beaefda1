"""PEFT adapter directories and weights2weights exports.

A directory is adapter_config.json + adapter_model.safetensors (or .bin); a LoRA of several models
has one folder for each ("unet", "text_encoder", "text_encoder_2"). Text encoder modules are named
as transformers >= 5.6 names them (no "text_model." in CLIPTextModel); both namings are read.
weights2weights: folder "unet" with keys that carry the adapter name "identity1" and lora_alpha
27 · rank, so 1/27 of the up factor is stored, beside the same numbers as one vector, weights.npy.
"""

import collections
import functools
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import TEXT_ENCODERS, LoraSpec
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.lora_files.base_files import read_json, read_weights
from hyperlora_jax.lora_files.lora_config import check_config, config_scale

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
VECTOR_NAME = "weights.npy"
PREFIX = "base_model.model."  # of every key
W2W_SCALE = 27
W2W_ADAPTER = "identity1"
OPEN_CLIP_G = 1280  # width of SDXL's second text encoder
COMPONENTS = ("unet", *TEXT_ENCODERS)
Arrays = Mapping[str, tuple[np.ndarray, np.ndarray]]


def adapter_folders(path: Path) -> dict[str, Path]:
    """{component: folder} of a PEFT directory or a folder of them; {} when it is neither.

    A directory without sub-folders belongs to the component that its name, or else its keys, say:
    "" here for the latter.
    """
    if (path / CONFIG_NAME).exists() or weights_of(path):
        return {path.name if path.name in COMPONENTS else "": path}
    return {name: path / name for name in COMPONENTS if weights_of(path / name)}


def further_adapters(path: Path) -> list[str]:
    """Folders inside an adapter's, where PEFT keeps a model's adapters of other names."""
    inside = sorted(path.iterdir()) if (path / CONFIG_NAME).exists() else []
    return [folder.name for folder in inside if (folder / CONFIG_NAME).exists()]


def weights_of(folder: Path, name: str = WEIGHTS_NAME) -> Path | None:
    """The file of this name in a folder, or else the one that older versions wrote by PyTorch."""
    files = (folder / name, (folder / name).with_suffix(".bin"))
    return next((file for file in files if file.exists()), None)


def read_folder(path: Path, component: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors with the keys of a single file, plus a ".scale" for every module; metadata."""
    if (weights := weights_of(path)) is None:
        raise UserError(f"{path}: has {CONFIG_NAME} but no {WEIGHTS_NAME}")
    tensors, metadata = read_weights(weights)
    config_path = path / CONFIG_NAME
    if not config_path.exists():
        raise UserError(f"{path}: has {weights.name} but no {CONFIG_NAME}, which holds the scale")
    config = read_json(config_path)
    check_config(config_path, config, tensors)
    component = component or _second_text_encoder(tensors)
    result = {}
    for key, array in tensors.items():
        name, module, scale_name = _names(key, component)
        result[name] = array
        if module is not None and array.ndim >= 1:
            rank = None if ".lokr_" in key else array.shape[0]
            scale = config_scale(config_path, config, module, rank)
            result[scale_name] = np.array(scale, np.float64)
    return result, metadata


def _second_text_encoder(tensors: Mapping[str, np.ndarray]) -> str:
    """ "text_encoder_2" where only SDXL's second text encoder has such layers, else ""."""
    for key, array in tensors.items():
        if "text_projection" in key:
            return TEXT_ENCODERS[1]
        if ".self_attn.q_proj.lora_A" in key and array.ndim == 2 and array.shape[1] == OPEN_CLIP_G:
            return TEXT_ENCODERS[1]
    return ""


@functools.lru_cache(maxsize=1 << 16)
def _names(key: str, component: str) -> tuple[str, str | None, str]:
    """(key as in a single file, module of the layer's first key or None, name of its scale)."""
    bare = key.removeprefix(PREFIX)
    name = f"{component}.{bare}" if component else key
    # hada_w1_b: its rows are the rank in every form of LoHa.
    match = re.search(r"\.(?:lora_A|hada_w1_b|lokr_w1(?:_a)?$)", bare)
    module = bare[: match.start()] if match else None
    return name, module, name[: len(name) - len(bare) + match.start()] + ".scale" if match else ""


def write_peft(path: Path, sites: Arrays, spec: LoraSpec, metadata: Mapping[str, str]) -> Path:
    """Adapter directory; a folder for each model when there are several."""
    models = _by_model(spec)
    folders = {name: path if list(models) == ["unet"] else path / name for name in models}
    _remove_stale(path, set(folders.values()))
    for name, folder in folders.items():
        part = models[name]
        _write_folder(folder, {s.path: sites[s.path] for s in part}, part, metadata)
    return path


@functools.lru_cache(maxsize=64)
def _by_model(spec: LoraSpec) -> Mapping[str, LoraSpec]:
    parts = {name: spec.component(name) for name in COMPONENTS}
    return {name: part for name, part in parts.items() if part.sites}


def _remove_stale(path: Path, kept: set[Path]) -> None:
    """Adapter files of an earlier write that the new one would not replace."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a folder for the adapter")
    for folder in {path, *(path / name for name in COMPONENTS)} - kept:
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (folder / name).unlink(missing_ok=True)
    (path / VECTOR_NAME).unlink(missing_ok=True)


def write_weights2weights(
    path: Path, sites: Arrays, spec: LoraSpec, metadata: Mapping[str, str]
) -> Path:
    """unet/ with weights2weights' keys and alpha, and the flat float32 vector weights.npy.

    The B factors come divided by `W2W_SCALE`.
    """
    for site in spec.sites:
        if site.component != "unet":
            raise UserError(f"LoRA site {site.path} cannot be carried by weights2weights files")
    vector, start = np.empty(spec.num_parameters, np.float32), 0
    for matrix in (matrix for name in sorted(sites) for matrix in sites[name]):
        vector[start : start + matrix.size] = matrix.reshape(-1)
        start += matrix.size
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(vector))
    _remove_stale(path, {path / "unet"})
    _write_folder(path / "unet", sites, spec, metadata, W2W_SCALE, f".{W2W_ADAPTER}")
    safetensors_io.atomic_write(path / VECTOR_NAME, head.getvalue(), vector)
    return path


def _write_folder(
    folder: Path,
    sites: Arrays,
    spec: LoraSpec,
    metadata: Mapping[str, str],
    scale: int = 1,
    adapter: str = "",
) -> None:
    tensors = {}
    for name, (a, b) in sites.items():
        module = _module(name)
        tensors[f"{PREFIX}{module}.lora_A{adapter}.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B{adapter}.weight"] = b
    safetensors_io.write(folder / WEIGHTS_NAME, tensors, metadata)
    safetensors_io.atomic_write(folder / CONFIG_NAME, config(spec, scale))


@functools.lru_cache(maxsize=64)
def config(spec: LoraSpec, scale: int = 1) -> bytes:
    """adapter_config.json of LoRAs of one spec; sites of another rank than most are listed."""
    rank = collections.Counter(site.rank for site in spec.sites).most_common(1)[0][0]
    ranks = {_module(site.path): site.rank for site in spec.sites if site.rank != rank}
    patterns = {"rank_pattern": ranks, "alpha_pattern": ranks} if ranks else {}
    texts = patterns | {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(_module(site.path) for site in spec.sites),
        "task_type": None,
    }
    return (json.dumps(texts, indent=2, sort_keys=True) + "\n").encode()


def _module(path: str) -> str:
    """PyTorch module name inside its own model, as transformers >= 5.6 has it."""
    if path.startswith("text_encoder."):
        return path.removeprefix("text_encoder.").removeprefix("text_model.")
    return path.removeprefix("text_encoder_2.")


def read_vector(path: Path, spec: LoraSpec) -> dict[str, np.ndarray]:
    """PEFT tensors and scales of a weights2weights vector (.npy, [d] or [1, d])."""
    try:
        vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable .npy array") from error
    if vector.size != spec.num_parameters or vector.dtype.kind != "f":
        raise UserError(
            f"{path}: {vector.size} numbers of {vector.dtype}, the spec has {spec.num_parameters}"
        )
    vector, start, tensors = vector.reshape(-1), 0, {}
    for site in spec.sites:
        window = site.kernel_size if site.kind == "conv" else ()
        ones = (1, 1) if site.kind == "conv" else ()
        for name, shape in (
            ("lora_A", (site.rank, site.in_features, *window)),
            ("lora_B", (site.out_features, site.rank, *ones)),
        ):
            size = int(np.prod(shape))
            tensors[f"unet.{site.path}.{name}.weight"] = vector[start : start + size].reshape(shape)
            start += size
        tensors[f"unet.{site.path}.scale"] = np.array(W2W_SCALE, np.float64)
    return tensors
