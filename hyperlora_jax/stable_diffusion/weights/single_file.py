"""Single files in the original layout of Stable Diffusion 1.x, 2.x and XL as bases.

Such a file is unpacked once, into the folder of parts that every command reads, below
`storage.cache_folder()`; `packed` writes a changed folder back in the file's own form. What neither
tensors nor header say is given once (`prediction_type`, `tokenizer`) and kept with that folder.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.diffusion.scheduler_config import read_scheduler_config
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.lora_files.base_files import WEIGHT_STEMS, Loader, read_json, weight_files
from hyperlora_jax.stable_diffusion.weights import directory, loading
from hyperlora_jax.stable_diffusion.weights.clip_tokenizer import load_tokenizer
from hyperlora_jax.stable_diffusion.weights.families import SCHEDULER, configs_of
from hyperlora_jax.stable_diffusion.weights.flax_trees import param_shapes, torch_to_flax
from hyperlora_jax.stable_diffusion.weights.original_names import Target, translate
from hyperlora_jax.stable_diffusion.weights.parts import check_parts
from hyperlora_jax.stable_diffusion.weights.tensor_stream import read_tensors

SUFFIXES = (".safetensors", ".ckpt")
SD2_BASE_STEP = 875000
CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer all families have
STAMP = "single_file.json"
_PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}


def base_folder(source: str | Path, variant: str | None = None) -> Path:
    """The folder of a base: itself, a hub id's, a bucket's, or that of an unpacked single file.

    Raises:
        UserError: it is none of them.
    """
    path = Path(str(source))
    if path.suffix in SUFFIXES and path.is_file():
        return unpacked(path)
    return loading.local_directory(source, variant)


def unpacked(
    path: Path, prediction_type: str | None = None, tokenizer: str | Path | None = None
) -> Path:
    """The folder of a single file's parts; made again only when the file has changed.

    Args:
        prediction_type: what the UNet predicts, where the file does not say it or says it wrong.
        tokenizer: a tokenizer's folder, or that of a base with one.

    Raises:
        UserError: a foreign file, an unknown, missing or ill-shaped tensor, a full disk.
    """
    path = path.resolve()
    folder = storage.cache_folder() / "bases" / f"{path.stem}-{storage.digest(path)}"
    stat = path.stat()
    stamp = {"file": str(path), "size": stat.st_size, "time": stat.st_mtime_ns}
    try:
        if _stamp_of(folder) != stamp:
            _unpack(path, folder, stamp, prediction_type)
        elif prediction_type:
            schedule = _schedule(dict(_tensors(path)), path, _is_sd2(folder), prediction_type)
            _write_schedule(folder, schedule)
        if tokenizer:
            _keep_tokenizer(Path(tokenizer), folder)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be unpacked into {folder} ({storage.reason(error)}); HYPERLORA_CACHE "
            "names another place"
        ) from error
    return folder


def place_of(folder: Path, component: str) -> str:
    """Where a component of a base was looked for, in the words of an error."""
    if not (folder / STAMP).is_file():
        return f"{folder / component}: folder not found"
    return f"{read_json(folder / STAMP)['file']}: has no such part"


def _stamp_of(folder: Path) -> Json | None:
    try:
        return json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None


def _unpack(path: Path, folder: Path, stamp: Json, prediction_type: str | None) -> None:
    tensors = dict(_tensors(path))
    try:
        configs = configs_of({name: tensor.shape for name, tensor in tensors.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    is_sd2 = configs["unet"]["cross_attention_dim"] == 1024
    schedule = _schedule(tensors, path, is_sd2, prediction_type)
    try:
        parts = _parts(tensors, configs)
        modules = {name: loading.CONSTRUCTORS[name](config) for name, config in configs.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for name in modules:
        # Shapes alone: every tensor is known, there once, and fits.
        empty = [(tensor_name, t.outline) for tensor_name, t in parts[name].items()]
        torch_to_flax(empty, param_shapes(modules[name]), name, str(path), lambda _, array: array)
    check_parts(modules, path)
    if is_sd2 and schedule.prediction_type == "v_prediction":
        configs["unet"]["sample_size"] = 96
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of its own name: several processes of one host may unpack the same file at once.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        new = Path(place) / "base"
        for name, config in configs.items():
            directory.write_json(new / name / "config.json", config)
            own = parts[name]
            safetensors_io.write_streamed(
                new / name / f"{WEIGHT_STEMS[name]}.safetensors",
                {key: tensor.outline() for key, tensor in own.items()},
                lambda key, own=own: own[key].load(),
                {"format": "pt"},
            )
        _write_schedule(new, schedule)
        tokenizers = [
            n.replace("text_encoder", "tokenizer") for n in modules if n.startswith("text")
        ]
        is_xl = "addition_embed_type" in configs["unet"]
        index = loading.model_index(modules, tokenizers, schedule, is_xl)
        directory.write_json(new / "model_index.json", index)
        directory.write_json(new / STAMP, stamp)
        if _stamp_of(folder) == stamp:  # another process was first, and may be reading it
            return
        shutil.rmtree(folder, ignore_errors=True)
        new.replace(folder)
    print(f"{path}: {' '.join(configs)}, predicts {schedule.prediction_type}; unpacked to {folder}")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Shape and dtype of a tensor, and how to get its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Loader

    def outline(self) -> np.ndarray:
        """An array of the shape and dtype that takes no memory."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)


def _tensors(path: Path) -> Iterator[tuple[str, _Tensor]]:
    if path.suffix == ".safetensors":
        entries = safetensors_io.read_shapes(path)
        for name, load in read_tensors([path]):
            dtype, shape = entries[name]
            yield name, _Tensor(shape, dtype, load)
        return
    for name, load in read_tensors([path]):
        array = load()
        yield name, _Tensor(array.shape, array.dtype, load)


def _parts(
    tensors: Mapping[str, _Tensor], configs: Mapping[str, Json]
) -> dict[str, dict[str, _Tensor]]:
    """{component: {name in its own file: tensor}}."""
    parts: dict[str, dict[str, _Tensor]] = {name: {} for name in configs}
    for name, tensor in tensors.items():
        for target in translate(name, configs):
            if target.component in parts:
                parts[target.component][target.name] = _cut(tensor, target)
    return parts


def _cut(tensor: _Tensor, target: Target) -> _Tensor:
    def change(array: np.ndarray) -> np.ndarray:
        if target.third is not None:
            array = np.split(array, 3)[target.third]
        if target.component == "vae" and ".attentions." in target.name and array.ndim == 4:
            array = array[:, :, 0, 0]  # 1×1 convolutions there, linear layers in diffusers
        return array.T if target.transpose else array

    shape = change(tensor.outline()).shape
    return _Tensor(shape, tensor.dtype, lambda: change(tensor.load()))


def packed(source: Path, folder: Path, out: Path) -> Path:
    """Writes the single file `source` with the weights of a folder in place of its own.

    Raises:
        UserError: it is no .safetensors file.
    """
    if source.suffix != ".safetensors":
        raise UserError(f"{out}: only a .safetensors base is written as one file; name a folder")
    tensors = dict(_tensors(source))
    configs = configs_of({name: tensor.shape for name, tensor in tensors.items()})
    changed = {name: dict(read_tensors(weight_files(folder / name, name))) for name in configs}

    def make(name: str) -> np.ndarray:
        targets = [t for t in translate(name, configs) if t.component in configs]
        if not targets:
            return tensors[name].load()
        arrays = [changed[target.component][target.name]() for target in targets]
        joined = np.concatenate([a.T if targets[0].transpose else a for a in arrays])
        return joined.reshape(tensors[name].shape)

    like = {name: tensor.outline() for name, tensor in tensors.items()}
    safetensors_io.write_streamed(out, like, make, safetensors_io.read_metadata(source))
    return out


def _schedule(
    tensors: Mapping[str, _Tensor], path: Path, is_sd2: bool, asked: str | None
) -> NoiseSchedule:
    """The noise schedule of a single file, from the marks that such files carry.

    Empty tensors `v_pred` and `ztsnr` (ComfyUI, SDXL fine-tunes) and the header's
    modelspec.prediction_type say it; a 2.x file without either predicts v unless it is the base of
    step 875,000 (as diffusers tells them apart), all others noise.

    Raises:
        UserError: an EDM model, or marks that contradict each other.
    """
    edm = sorted(name for name in tensors if name.startswith("edm_"))
    if edm:
        raise UserError(
            f"{path}: tensor {edm[0]!r} marks an EDM model (CosXL, Playground v2.5), whose noise "
            "schedule is not supported"
        )
    said = {}
    if "v_pred" in tensors:
        said["tensor 'v_pred'"] = "v_prediction"
    if path.suffix == ".safetensors":
        text = safetensors_io.read_metadata(path).get("modelspec.prediction_type", "")
        if text:
            said["modelspec.prediction_type"] = _PREDICTIONS.get(text.lower(), text)
    if asked is None and len(set(said.values())) > 1:
        both = ", ".join(f"{mark} says {value}" for mark, value in said.items())
        raise UserError(f"{path}: {both}; say which by --prediction_type")
    step = int(tensors["global_step"].load().reshape(-1)[0]) if "global_step" in tensors else None
    by_family = "v_prediction" if is_sd2 and step != SD2_BASE_STEP else "epsilon"
    if is_sd2 and step is None and not said and asked is None:
        print(
            f"{path}: does not say what it predicts, taken as v_prediction; if it is a 2.x base of "
            "512 pixels, give --prediction_type epsilon"
        )
    predicts = asked or next(iter(said.values()), by_family)
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    marks = zero if "ztsnr" in tensors else {}
    try:
        return read_scheduler_config({**SCHEDULER, "prediction_type": predicts, **marks})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _is_sd2(folder: Path) -> bool:
    return read_json(folder / "unet" / "config.json")["cross_attention_dim"] == 1024


def _write_schedule(folder: Path, schedule: NoiseSchedule) -> None:
    directory.write_json(folder / "scheduler" / "scheduler_config.json", schedule.to_config())


def _keep_tokenizer(source: Path, folder: Path) -> None:
    """Puts tokenizers into an unpacked folder: those of a base's folder, or one for all encoders.

    The second one of SDXL pads with "!" where its vocabulary has that, as OpenCLIP does.
    """
    for name in ("tokenizer", "tokenizer_2"):
        if not (folder / name.replace("tokenizer", "text_encoder")).is_dir():
            continue
        own = source / name
        tokenizer: Any = load_tokenizer(own if own.is_dir() else source)
        if name == "tokenizer_2" and not own.is_dir() and "!" in tokenizer.get_vocab():
            tokenizer.pad_token = "!"
        tokenizer.save_pretrained(str(folder / name))


def family_tokenizer(folder: Path) -> None:
    """Gives an unpacked folder the tokenizer that all families share, from the hub or its cache.

    Raises:
        UserError: it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        wanted = ["vocab.json", "merges.txt", "*token*.json"]
        source = snapshot_download(CLIP, allow_patterns=wanted)
    except Exception as error:
        raise UserError(
            f"{read_json(folder / STAMP)['file']}: holds no tokenizer, and {CLIP} cannot "
            f"be downloaded ({storage.reason(error)}); give --tokenizer DIR"
        ) from error
    _keep_tokenizer(Path(source), folder)
