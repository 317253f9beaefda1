"""Whole models from and to diffusers directories."""

import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hyperlora_jax import storage
from hyperlora_jax.array_types import DType, Json, Params
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.diffusion.scheduler_config import read_scheduler_config
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files.base_files import read_json, weight_files, what_is_there
from hyperlora_jax.parallel.sharding import DEFAULT_RULES, Rule
from hyperlora_jax.shipped import base_path
from hyperlora_jax.stable_diffusion.networks.autoencoder import vae_from_config
from hyperlora_jax.stable_diffusion.networks.clip_text import text_model_from_config
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights import directory, hub
from hyperlora_jax.stable_diffusion.weights.clip_tokenizer import Tokenizer
from hyperlora_jax.stable_diffusion.weights.flax_trees import param_shapes, torch_to_flax
from hyperlora_jax.stable_diffusion.weights.parts import Component, check_parts
from hyperlora_jax.stable_diffusion.weights.tensor_stream import (
    Placing,
    placing,
    read_tensors,
    to_devices,
)

log = logging.getLogger(__name__)
GUIDANCE = 7.5  # of Stable Diffusion, where a base does not say otherwise
SAMPLING = "sampling.json"  # where it does: {"guidance": 1.0}; other programs pass over it
CONSTRUCTORS = {
    "unet": unet_from_config,
    "vae": vae_from_config,
    "text_encoder": text_model_from_config,
    "text_encoder_2": text_model_from_config,
}


def local_directory(source: str | Path, variant: str | None = None) -> Path:
    """The directory itself, or the files of a bucket or hub id after downloading them.

    Raises UserError when `source` is none of them.
    """
    root = storage.fetched(base_path(str(source)))
    if root.is_dir():
        return root
    parts = str(source).split("/")
    if root.exists() or len(parts) != 2 or not all(parts) or str(source).startswith("."):
        raise UserError(f"{source}: not a directory, expected a diffusers model directory")
    return hub.download(str(source), variant)


def load_directory(
    root: Path,
    dtype: DType,
    variant: str | None,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
    on_host: Collection[str] = (),
) -> tuple[dict[str, Component], dict[str, Params], NoiseSchedule]:
    """Modules, parameters and schedule of a diffusers directory. Raises UserError naming files."""
    modules = load_modules(root, dtype, CONSTRUCTORS)
    params = {}
    for name, (module, dtype) in modules.items():
        where = placing(name, mesh, rules, on_host)
        params[name] = _params(module, root / name, name, dtype, variant, where)
    return {name: module for name, (module, _) in modules.items()}, params, load_schedule(root)


def load_guidance(root: Path) -> float:
    """The guidance that a base is sampled with unless told otherwise: what its `sampling.json`
    says ({"guidance": 1.0}), or that of Stable Diffusion.

    Raises:
        UserError: the file says no number.
    """
    file = root / SAMPLING
    guidance = read_json(file).get("guidance", GUIDANCE) if file.is_file() else GUIDANCE
    if isinstance(guidance, bool) or not isinstance(guidance, int | float):
        raise UserError(f"{file}: guidance is {guidance!r}, expected a number")
    return float(guidance)


def load_modules(
    root: Path, dtype: DType, names: Iterable[str]
) -> dict[str, tuple[Component, DType]]:
    """(module, dtype) of every component of `names` that is there, from the configs alone.

    Raises:
        UserError: no UNet, a config that is not supported, parts that do not belong together.
    """
    if not (root / "unet").is_dir():
        raise UserError(f"{root / 'unet'}: folder not found, expected {what_is_there(root)}")
    modules = {
        name: load_module(root / name, name, dtype) for name in names if (root / name).is_dir()
    }
    check_parts({name: module for name, (module, _) in modules.items()}, root)
    return modules


def load_schedule(root: Path) -> NoiseSchedule:
    """The noise schedule of a model directory, as PyTorch's pipeline of the family takes it."""
    file = root / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    try:
        schedule = read_scheduler_config(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    index = root / "model_index.json"
    named = read_json(index).get("scheduler") if index.is_file() else None
    own = config.get("_class_name")
    if isinstance(named, list) and named and own and own != named[-1]:
        log.warning(
            "%s says %s, %s says %s: the latter is drawn, PyTorch's pipeline draws the former",
            index, named[-1], file, own,
        )  # fmt: skip
    xl = read_json(root / "unet" / "config.json").get("addition_embed_type")
    # StableDiffusionPipeline sets the offset to 1 whatever the file says; SDXL's does not.
    return schedule if xl else dataclasses.replace(schedule, steps_offset=1)


def load_component(
    folder: Path,
    name: str,
    dtype: DType,
    variant: str | None = None,
) -> tuple[Component, Params]:
    """Module and parameters of one component folder, one tensor in host memory at a time."""
    module, dtype = load_module(folder, name, dtype)
    return module, _params(module, folder, name, dtype, variant, to_devices)


def _params(
    module: Component,
    folder: Path,
    name: str,
    dtype: DType,
    variant: str | None,
    where: Placing,
) -> Params:
    files = weight_files(folder, name, variant)
    shapes = param_shapes(module)
    place = where(shapes, dtype)
    return torch_to_flax(read_tensors(files), shapes, name, str(files[0]), place)


def load_module(folder: Path, name: str, dtype: DType) -> tuple[Component, DType]:
    """Module of one component folder, from its config.json alone, and the dtype it works in."""
    config = read_json(folder / "config.json")
    dtype = component_dtype(name, config, dtype)
    try:
        return CONSTRUCTORS[name](config, dtype), dtype
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def component_dtype(name: str, config: Json, dtype: DType) -> DType:
    """float32 for an autoencoder that overflows in float16 (SDXL's), else `dtype`."""
    overflows = name == "vae" and config.get("force_upcast", True)
    return np.float32 if overflows and dtype == jnp.float16 else dtype


def save_directory(
    root: Path,
    modules: Mapping[str, Component],
    params: Mapping[str, Params],
    schedule: NoiseSchedule,
    tokenizers: Mapping[str, Tokenizer],
    dtype: str,
    is_xl: bool,
    guidance: float = GUIDANCE,
) -> None:
    """Writes a directory that diffusers' StableDiffusion(XL)Pipeline loads.

    `tokenizers` = {"tokenizer": ..., "tokenizer_2": ...}.
    """
    for name, module in modules.items():
        directory.write_component(root / name, name, module.config, params[name], dtype)
    directory.write_json(root / "scheduler" / "scheduler_config.json", schedule.to_config())
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(str(root / name))
    index = model_index(modules, tokenizers, schedule, is_xl)
    directory.write_json(root / "model_index.json", index)
    if guidance != GUIDANCE:
        directory.write_json(root / SAMPLING, {"guidance": guidance})


def model_index(
    modules: Mapping[str, Component],
    tokenizers: Iterable[str],
    schedule: NoiseSchedule,
    is_xl: bool,
) -> Json:
    """model_index.json of a directory: which class reads each of its parts."""
    unet = modules["unet"].settings
    given = unet.in_channels - unet.out_channels
    kind = {0: "", unet.out_channels: "InstructPix2Pix"}.get(given, "Inpaint")
    index: dict[str, object] = {
        "_class_name": f"StableDiffusion{'XL' if is_xl else ''}{kind}Pipeline",
        "_diffusers_version": "0.33.0",
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", schedule.to_config()["_class_name"]],
    }
    if is_xl:
        index["force_zeros_for_empty_prompt"] = True
        index["image_encoder"] = [None, None]
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for name, module in modules.items():
        index[name] = {
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }.get(name) or ["transformers", module.class_name]
    return index | {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
