"""The diffusers directory layout: component folders with config.json and safetensors."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.checkpoint import flax_to_torch

WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "image_encoder": "model",
}
_HASH_FILE = "base_hash.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError naming the file when it is missing or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: file not found") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_files(folder: Path, component: str, variant: str | None = None) -> list[Path]:
    """Weight files of a component: one safetensors file, its shards, or a .bin file.

    Raises UserError when there are none, or when a shard of the index is missing.
    """
    stem = WEIGHT_STEMS[component]
    suffix = f".{variant}" if variant else ""
    single = folder / f"{stem}{suffix}.safetensors"
    if single.is_file():
        return [single]
    indices = (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json")
    for index in (folder / name for name in indices):
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            for name in names:
                if not (folder / name).is_file():
                    raise UserError(f"{folder / name}: file not found, named by {index.name}")
            return [folder / name for name in names]
    pickles = {"model": "pytorch_model"}
    pickled = folder / f"{pickles.get(stem, stem)}{suffix}.bin"
    if pickled.is_file():
        return [pickled]
    raise UserError(f"{single}: file not found (weights of the {component})")


def any_weight_files(folder: Path, component: str) -> list[Path]:
    """Weight files of whichever variant is there: full precision first."""
    try:
        return weight_files(folder, component)
    except UserError:
        return weight_files(folder, component, "fp16")


def read_tensors(files: list[Path]) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """(name, loader) of every tensor of safetensors files, one tensor in memory at a time."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        if path.suffix in (".bin", ".ckpt", ".pt"):
            yield from _read_pickle(path)
            continue
        try:
            # Not closed here: the loaders read from it; it closes when the last one is dropped.
            handle = safe_open(path, framework="numpy")
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, lambda name=name, handle=handle: handle.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _read_pickle(path: Path) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Tensors of a PyTorch file; `weights_only=True` runs no code from it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading a .bin file needs PyTorch, install hyperlora-jax[torch] or use "
            "safetensors"
        ) from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not a file of plain tensors ({type(error).__name__})") from error
    for name, tensor in tensors.get("state_dict", tensors).items():
        if not hasattr(tensor, "numpy"):
            continue  # training bookkeeping: step counters and the like
        yield name, lambda tensor=tensor: tensor.float().numpy()


def write_component(
    folder: Path, component: str, config: Mapping[str, Any], params: Params, dtype: str
) -> None:
    """Writes config.json and one safetensors file."""
    from safetensors.numpy import save_file

    write_json(folder / "config.json", config)
    tensors = {
        name: array.astype(jnp.dtype(dtype)) for name, array in flax_to_torch(params).items()
    }
    save_file(tensors, folder / f"{WEIGHT_STEMS[component]}.safetensors", {"format": "pt"})


def hash_of_params(params: Params) -> str:
    """sha256 of a model's tensors: see `hash_tensors`."""
    return hash_tensors(flax_to_torch(jax.device_get(params)))


def hash_tensors(tensors: Mapping[str, np.ndarray | Callable[[], np.ndarray]]) -> str:
    """sha256 over name, shape and float16 bytes of every tensor (or loader) in name order.

    float16, so that a base and its fp16 variant, or its export, have one identity.
    """
    digest = hashlib.sha256()
    with np.errstate(over="ignore"):
        for name, given in sorted(tensors.items()):
            array = given() if callable(given) else given
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array.astype(np.float16)).tobytes())
    return digest.hexdigest()


def hash_of_files(files: list[Path]) -> str:
    """sha256 of a model's tensors on disk: see `hash_tensors`. One tensor is in memory at a time:
    the file is opened anew for each, so that pages of the former one leave this process."""
    loaders: dict[str, Callable[[], np.ndarray]] = {}
    for path in files:
        for name, load in read_tensors([path]):
            alone = path.suffix == ".safetensors"
            loaders[name] = functools.partial(_read_one, path, name) if alone else load
    return hash_tensors(loaders)


def _read_one(path: Path, name: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


def cached_hash(folder: Path, files: list[Path], compute: Callable[[], str]) -> str:
    """`compute()`, kept in `folder`/base_hash.json while sizes and times of `files` stay."""
    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    cache = folder / _HASH_FILE
    if cache.is_file():
        found = json.loads(cache.read_text())
        if found.get("files") == stamp:
            return found["sha256"]
    value = compute()
    try:
        cache.write_text(json.dumps({"files": stamp, "sha256": value}) + "\n")
    except OSError:
        return value  # a read-only model folder: computed again next time
    return value
