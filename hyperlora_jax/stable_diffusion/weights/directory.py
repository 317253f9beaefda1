"""The diffusers directory layout: component folders with config.json and safetensors."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.stable_diffusion.weights.flax_trees import flax_to_torch
from hyperlora_jax.stable_diffusion.weights.tensor_stream import Loader, read_tensors

WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "image_encoder": "model",
}
PICKLED_STEMS = {"model": "pytorch_model"}
_HASH_FILE = "base_hash.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError naming the file when it is missing or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: file not found") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON object, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_files(folder: Path, component: str, variant: str | None = None) -> list[Path]:
    """Weight files of a component: one safetensors file, its shards, or a .bin file.

    Without `variant`, full precision comes first, then fp16, then whichever variant is there: many
    bases are published in half precision only.

    Raises UserError when there are none, or when a shard of the index is missing.
    """
    stem = WEIGHT_STEMS[component]
    for suffix in [f".{variant}"] if variant else ["", ".fp16", *_variants(folder, stem)]:
        found = _of_variant(folder, stem, suffix)
        if found:
            return found
    named = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    raise UserError(f"{folder / named}: file not found (weights of the {component})")


def _of_variant(folder: Path, stem: str, suffix: str) -> list[Path]:
    single = folder / f"{stem}{suffix}.safetensors"
    if single.is_file():
        return [single]
    indices = (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json")
    for index in (folder / name for name in indices):
        if index.is_file():
            shards = read_json(index).get("weight_map")
            shards = shards.values() if isinstance(shards, dict) else ()
            names = sorted({str(name) for name in shards})
            if not names:
                raise UserError(f"{index}: has no weight_map, expected the names of the shards")
            for name in names:
                if not (folder / name).is_file():
                    raise UserError(f"{folder / name}: file not found, named by {index.name}")
            return [folder / name for name in names]
    pickled = folder / f"{PICKLED_STEMS.get(stem, stem)}{suffix}.bin"
    return [pickled] if pickled.is_file() else []


def _variants(folder: Path, stem: str) -> list[str]:
    """Suffixes of further variants: ".bf16" of `STEM.bf16.safetensors`."""
    files = sorted(folder.glob(f"{stem}.*.safetensors")) if folder.is_dir() else []
    suffixes = [file.name[len(stem) : -len(".safetensors")] for file in files]
    return [
        suffix for suffix in suffixes if not suffix.startswith(".fp16") and "-of-" not in suffix
    ]


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


def cached_hash(folder: Path, files: list[Path], compute: Callable[[], str]) -> str:
    """`compute()`, kept in `folder`/base_hash.json while sizes and times of `files` stay."""
    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    cache = folder / _HASH_FILE
    try:
        found = json.loads(cache.read_text())
        if found["files"] == stamp:
            return found["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or cut off by a full disk: computed again
    value = compute()
    try:
        cache.write_text(json.dumps({"files": stamp, "sha256": value}) + "\n")
    except OSError:
        return value  # a read-only model folder: computed again next time
    return value
