"""A base as far as LoRA files need it: the weight files in its folders, its layers, its family; and
whether a LoRA belongs to it.

Of a `BaseModel` only config.json and the headers of the safetensors files are read, so this takes
milliseconds.
"""

import dataclasses
import functools
import json
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from hyperlora_jax.array_types import Json, JsonDict, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import layer_fit
from hyperlora_jax.lora.sites import TEXT_ENCODERS, LoraSite, LoraSpec, spec_from_shapes
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.lora_files.header import PREFIX, Family
from hyperlora_jax.shipped import base_path

WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "image_encoder": "model",
}
PICKLED_STEMS = {"model": "pytorch_model"}
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pt", ".safetensors")
Loader = Callable[[], np.ndarray]
_TEXT_PREFIX = re.compile(r"^(?!text_model\.|text_projection)")


@dataclasses.dataclass(frozen=True, eq=False)
class BaseModel:
    """`layers`: every Linear and Conv2d as a site of rank 1, by path."""

    name: str
    family: Family
    layers_per_block: int
    layers: Mapping[str, LoraSite]


if TYPE_CHECKING:

    class LoadedBase(Protocol):
        """A base in memory, as a StableDiffusion is."""

        @property
        def params(self) -> Mapping[str, Params]:
            """Parameters by component."""
            ...

        @property
        def base_hash(self) -> str:
            """Hash of the UNet's tensors."""
            ...

    Base = BaseModel | LoadedBase


def read_base_model(path: str | Path) -> BaseModel:
    """Layers of a diffusers directory or an embedded model. Raises UserError when it is none."""
    folder = Path(base_path(str(path)))
    config = _config(folder / "unet")
    layers: dict[str, LoraSite] = {}
    for component in ("unet", *TEXT_ENCODERS):
        if (folder / component / "config.json").exists():
            layers |= {site.path: site for site in _layers(folder / component, component)}
    family: Family = "sd1"
    if config.get("addition_embed_type") == "text_time":
        family = "sdxl"
    elif config.get("use_linear_projection"):
        family = "sd2"
    number = config.get("layers_per_block", 2)
    return BaseModel(str(path), family, number if isinstance(number, int) else 2, layers)


def _config(folder: Path) -> Json:
    if not folder.is_dir():
        raise UserError(f"{folder}: folder not found, expected {what_is_there(folder.parent)}")
    return read_json(folder / "config.json")


def read_json(path: Path) -> JsonDict:
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


def what_is_there(root: Path) -> str:
    """What was expected of a folder without a UNet, in the words of what it holds."""
    kind = root / "model_index.json"
    if kind.is_file() and (name := read_json(kind).get("_class_name")):
        return f"a Stable Diffusion 1.x, 2.x or XL model, found a {name}"
    inner = next((kind for way in _INNER for kind in sorted(root.glob(way))), None)
    there = f"; there is a model in {inner.parent}" if inner else ""
    return f"the UNet of a diffusers model directory{there}"


_INNER = ("*/model_index.json", "snapshots/*/model_index.json")  # unpacked archives, hub caches


def weight_files(folder: Path, component: str, variant: str | None = None) -> list[Path]:
    """Weight files of a component: one safetensors file, its shards, or likewise .bin files.

    Without `variant`, full precision comes first, then fp16, then whichever variant is there: many
    bases are published in half precision only.

    Raises UserError when there are none, or when a shard of the index is missing.
    """
    stem = WEIGHT_STEMS[component]
    for suffix in [f".{variant}"] if variant else ["", ".fp16", *_variants(folder, stem)]:
        files = _of_variant(folder, stem, suffix)
        if files:
            return files
    named = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    raise UserError(f"{folder / named}: file not found (weights of the {component})")


def _of_variant(folder: Path, stem: str, suffix: str) -> list[Path]:
    for name, ending in ((stem, "safetensors"), (PICKLED_STEMS.get(stem, stem), "bin")):
        single = folder / f"{name}{suffix}.{ending}"
        if single.is_file():
            return [single]
        indices = (f"{name}.{ending}.index{suffix}.json", f"{name}{suffix}.{ending}.index.json")
        for index in (folder / file for file in indices):
            if index.is_file():
                return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    names = sorted({str(name) for name in shards.values()} if isinstance(shards, dict) else ())
    if not names:
        raise UserError(f"{index}: has no weight_map, expected the names of the shards")
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: file not found, named by {index.name}")
    return [index.parent / name for name in names]


def _variants(folder: Path, stem: str) -> list[str]:
    """Suffixes of further variants: ".bf16" of `STEM.bf16.safetensors`."""
    files = sorted(folder.glob(f"{stem}.*.safetensors")) if folder.is_dir() else []
    suffixes = [file.name[len(stem) : -len(".safetensors")] for file in files]
    return [
        suffix for suffix in suffixes if not suffix.startswith(".fp16") and "-of-" not in suffix
    ]


def unused_weights(folder: Path, used: Collection[Path]) -> list[Path]:
    """Weights of a model folder that are not `used`: other variants and forms, with their index."""

    def of_used(index: Path) -> bool:
        return any(f'"{file.name}"' in index.read_text("utf-8", "replace") for file in used)

    return [
        file
        for file in sorted(folder.iterdir())
        if (file.suffix in _WEIGHTS and file not in used)
        or (file.name.endswith(".index.json") and not of_used(file))
    ]


def read_weights(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, metadata) of a safetensors or PyTorch file. Raises UserError naming it."""
    if is_pickled(file):
        return {name: load() for name, load in read_pickle(file)}, {"format": "pt"}
    return safetensors_io.read(file)


def is_pickled(file: Path) -> bool:
    """Whether PyTorch wrote it; some programs give safetensors files the ending .pt or .ckpt."""
    if file.suffix.lower() not in PICKLED or not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(9)[8:] != b"{"


def read_pickle(path: Path) -> Iterator[tuple[str, Loader]]:
    """(name, loader) of every tensor of a PyTorch file; `weights_only=True` runs no code from it.

    Raises:
        UserError: PyTorch is not installed, or the file holds something else.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading a {path.suffix} file needs PyTorch, install hyperlora-jax[torch] or "
            "use safetensors"
        ) from error
    try:
        # Files from before PyTorch 1.6 are no zip archives: those are read whole.
        mapped = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        with path.open("rb") as file:
            kind = safetensors_io.other_kind(start) if (start := file.read(64)) else "empty file"
        if kind and "pickle" not in kind:
            raise UserError(f"{path}: {kind}, expected PyTorch weights") from error
        raise UserError(
            f"{path}: no PyTorch file of plain tensors ({type(error).__name__}); if it holds "
            "Python objects too (checkpoints of trainers do), reading it would run code: save its "
            "state_dict as .safetensors where you trust it"
        ) from error
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        held = "numbers as names" if isinstance(tensors, dict) else type(tensors).__name__
        raise UserError(f"{path}: found {held}, expected tensors by their names")
    for name, tensor in tensors.items():
        if isinstance(tensor, int | float) and name.endswith((".alpha", ".scale")):
            yield name, functools.partial(np.asarray, tensor)
        elif hasattr(tensor, "numpy"):  # else training bookkeeping: step counters and the like
            yield name, functools.partial(_numpy, path, name, tensor)


def _numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
    try:
        tensor = tensor.detach().contiguous()
        if other := _NOT_NUMPYS.get(str(tensor.dtype)):
            import torch

            whole = torch.int16 if tensor.element_size() == 2 else torch.uint8
            return tensor.view(whole).numpy().view(other)
        return tensor.numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path}: {name} is no plain tensor ({str(error)[:80]})") from error


_NOT_NUMPYS = {
    "torch.bfloat16": ml_dtypes.bfloat16,
    "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "torch.float8_e5m2": ml_dtypes.float8_e5m2,
}


def tensor_files(folder: Path, component: str) -> list[tuple[Path, dict[str, str]]]:
    """[(file, {site path: tensor name})] of every 2-D and 4-D weight of a model folder."""
    return [
        (file, {path: name for path, (name, _) in _named(file, component).items()})
        for file in weight_files(folder, component)
    ]


def _named(file: Path, component: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    prefix = "" if component == "unet" else f"{component}."
    tensors = {}
    if is_pickled(file):
        shapes = {name: array.shape for name, array in read_weights(file)[0].items()}
    else:
        shapes = {name: shape for name, (_, shape) in safetensors_io.read_shapes(file).items()}
    for name, shape in shapes.items():
        if not name.endswith(".weight") or len(shape) not in (2, 4) or "embedding.w" in name:
            continue
        path = name.removesuffix(".weight")
        if prefix:
            path = prefix + _TEXT_PREFIX.sub("text_model.", path)
        tensors[path] = (name, shape)
    return tensors


def _layers(folder: Path, component: str) -> list[LoraSite]:
    sites = []
    for file in weight_files(folder, component):
        for path, (_, shape) in _named(file, component).items():
            window = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
            kind = "conv" if len(shape) == 4 else "linear"
            stride = (2, 2) if ".downsamplers." in path else (1, 1)
            sites.append(LoraSite(path, shape[1], shape[0], 1, kind, window, stride))
    return sites


def layers_per_block_of(base: object) -> int:
    """Resnets of one down block of the base's UNet; 2 when the base is None or a spec."""
    if isinstance(base, BaseModel):
        return base.layers_per_block
    config = getattr(getattr(base, "unet", None), "config", None)
    number = config.get("layers_per_block") if isinstance(config, Mapping) else None
    return number if isinstance(number, int) else 2


def check_base(
    path: str | os.PathLike[str],
    lora: Params,
    spec: LoraSpec,
    metadata: Mapping[str, str],
    base: "Base | LoraSpec | None",
) -> tuple[Params, LoraSpec]:
    """The LoRA as the base wants it (kinds, ranks, strides), or UserError naming both sides.

    `base` is None, a LoraSpec, a BaseModel, or a StableDiffusion: anything with `.params`
    ({"unet": tree, "text_encoder": …}) and `.base_hash`.
    """
    if base is None:
        return lora, spec
    if isinstance(base, LoraSpec):
        return layer_fit.on_spec(path, lora, spec, base)
    if isinstance(base, BaseModel):
        return layer_fit.on_layers(path, lora, spec, base.layers, f"the base {base.name}")
    adapted = _fit_model(path, lora, spec, base.params)
    wanted = metadata.get(PREFIX + "base_hash")
    if wanted is not None and (own := base.base_hash) != wanted:
        raise UserError(
            f"{path}: LoRA of another base: made for base {wanted[:12]}…, this base is "
            f"{own[:12]}… (the same shapes, other weights)"
        )
    return adapted


def _fit_model(
    path: str | os.PathLike[str], lora: Params, spec: LoraSpec, params: Mapping[str, Params]
) -> tuple[Params, LoraSpec]:
    table: dict[str, LoraSite] = {}
    for component in ("unet", *TEXT_ENCODERS):
        if component in params:
            prefix = "" if component == "unet" else f"{component}."
            part = spec_from_shapes(params[component], [""], 1, prefix=prefix)
            table |= part.by_path
    return layer_fit.on_layers(path, lora, spec, table, "the base")
