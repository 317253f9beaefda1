"""A base model as far as LoRA files need it: its layers and its family, read without its weights.

Only config.json and the headers of the safetensors files are read, so this takes milliseconds.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import TEXT_ENCODERS, LoraSite
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.lora_files.family import Family
from hyperlora_jax.shipped import base_path

_TEXT_PREFIX = re.compile(r"^(?!text_model\.|text_projection)")


@dataclasses.dataclass(frozen=True, eq=False)
class BaseModel:
    """`layers`: every Linear and Conv2d as a site of rank 1, by path."""

    name: str
    family: Family
    layers_per_block: int
    layers: Mapping[str, LoraSite]


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


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no readable config.json, expected a diffusers model directory"
        ) from error
    return config if isinstance(config, dict) else {}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model folder: the plain ones, or else one variant's."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if file.name.count(".") == 1]
    if not files:
        raise UserError(f"{folder}: no .safetensors file, expected model weights")
    return plain or files


def tensor_files(folder: Path, component: str) -> list[tuple[Path, dict[str, str]]]:
    """[(file, {site path: tensor name})] of every 2-D and 4-D weight of a model folder."""
    return [
        (file, {path: name for path, (name, _) in _named(file, component).items()})
        for file in weight_files(folder)
    ]


def _named(file: Path, component: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    prefix = "" if component == "unet" else f"{component}."
    found = {}
    for name, (_, shape) in safetensors_io.read_shapes(file).items():
        if not name.endswith(".weight") or len(shape) not in (2, 4) or "embedding.w" in name:
            continue
        path = name.removesuffix(".weight")
        if prefix:
            path = prefix + _TEXT_PREFIX.sub("text_model.", path)
        found[path] = (name, shape)
    return found


def _layers(folder: Path, component: str) -> list[LoraSite]:
    sites = []
    for file in weight_files(folder):
        for path, (_, shape) in _named(file, component).items():
            window = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
            kind = "conv" if len(shape) == 4 else "linear"
            stride = (2, 2) if ".downsamplers." in path else (1, 1)
            sites.append(LoraSite(path, shape[1], shape[0], 1, kind, window, stride))
    return sites
