"""The diffusers directory layout: component folders with config.json and safetensors."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax import storage
from hyperlora_jax.array_types import Params
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.lora_files.base_files import WEIGHT_STEMS, Loader
from hyperlora_jax.stable_diffusion.weights.flax_trees import flax_to_torch
from hyperlora_jax.stable_diffusion.weights.tensor_stream import read_tensors


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON object, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_component(
    folder: Path, component: str, config: Mapping[str, object], params: Params, dtype: str
) -> None:
    """Writes config.json and one safetensors file."""
    write_json(folder / "config.json", config)
    tensors = {
        name: array.astype(jnp.dtype(dtype)) for name, array in flax_to_torch(params).items()
    }
    file = folder / f"{WEIGHT_STEMS[component]}.safetensors"
    safetensors_io.write_streamed(file, tensors, tensors.__getitem__, {"format": "pt"})


def hash_of_params(params: Params) -> str:
    """sha256 of a model's tensors: see `hash_tensors`."""
    tensors = flax_to_torch(jax.device_get(params))
    return hash_tensors((name, lambda array=array: array) for name, array in tensors.items())


def hash_of_files(files: list[Path]) -> str:
    """sha256 of a model's tensors on disk: see `hash_tensors`."""
    return hash_tensors(read_tensors(files))


def hash_tensors(tensors: Iterable[tuple[str, Loader]]) -> str:
    """sha256 over name, shape and float16 bytes of every tensor in name order, one at a time.

    float16, so that a base and its fp16 variant, or its export, have one identity.
    """
    digest = hashlib.sha256()
    with np.errstate(over="ignore"):
        for name, load in sorted(tensors, key=lambda pair: pair[0]):
            array = load()
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array.astype(np.float16)).tobytes())
    return digest.hexdigest()


def cached_hash(folder: Path, files: list[Path]) -> str:
    """`hash_of_files`, kept in the cache folder while sizes and times of `files` stay.

    Nothing is written beside the model: it may lie in the installed package.
    """
    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    cache = storage.cache_folder() / "base_hashes" / f"{storage.digest(folder.absolute())}.json"
    try:
        cached = json.loads(cache.read_text())
        if cached["files"] == stamp:
            return cached["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or cut off by a full disk: computed again
    value = hash_of_files(files)
    with contextlib.suppress(OSError):  # no cache on this machine: computed again next time
        cache.parent.mkdir(parents=True, exist_ok=True)
        storage.replaced(cache, json.dumps({"files": stamp, "sha256": value}).encode())
    return value
