"""Models from the original single-file layouts of Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from hyperlora_jax.array_types import Params
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.diffusion.scheduler_config import read_scheduler_config
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.parallel.sharding import DEFAULT_RULES, Rule
from hyperlora_jax.stable_diffusion import loading
from hyperlora_jax.stable_diffusion.checkpoint import param_shapes, torch_to_flax
from hyperlora_jax.stable_diffusion.families import FAMILIES, SCHEDULER
from hyperlora_jax.stable_diffusion.original_names import Target, translate
from hyperlora_jax.stable_diffusion.tensor_stream import Loader, placing, read_tensors

SD2_BASE_STEP = 875000
_PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
Configs = Mapping[str, Mapping[str, Any]]


def load_single_file(
    path: Path,
    dtype: Any,
    configs: Configs | None = None,
    prediction_type: str | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
    on_host: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Params], NoiseSchedule]:
    """Modules, parameters and schedule of one .safetensors or .ckpt file.

    `configs` (component -> config.json dict) replaces those of the family found. What the UNet
    predicts is `prediction_type` or what the file says (`_schedule`). With a mesh the parameters
    are spread over it by `rules`; those of the components `on_host` stay in host memory.

    Raises:
        UserError: for a foreign file, an unknown, missing or ill-shaped tensor.
    """
    tensors = dict(read_tensors([path]))
    width = _text_width(tensors, path)
    schedule = _schedule(tensors, path, width, prediction_type)
    configs = configs or _family(width, path)
    found: dict[str, list[tuple[str, Loader]]] = {name: [] for name in configs}
    for name, load in tensors.items():
        try:
            targets = translate(name, configs)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        for target in targets:
            if target.component in found:
                found[target.component].append((target.name, _loader(load, target)))
    modules, params = {}, {}
    for name, config in configs.items():
        if not found[name] and name != "unet":
            continue  # pruned files leave parts out: an error only when they are used
        component_dtype = loading.component_dtype(name, config, dtype)
        modules[name] = loading.CONSTRUCTORS[name](config, component_dtype)
        shapes = param_shapes(modules[name])
        place = placing(name, mesh, rules, on_host)(shapes, component_dtype)
        params[name] = torch_to_flax(found[name], shapes, name, str(path), place)
    return modules, params, schedule


def _schedule(
    tensors: Mapping[str, Loader], path: Path, width: int, asked: str | None
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
        raise UserError(f"{path}: {both}; say which by prediction_type")
    by_family = "v_prediction" if width == 1024 and _step(tensors) != SD2_BASE_STEP else "epsilon"
    predicts = asked or next(iter(said.values()), by_family)
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    marks = zero if "ztsnr" in tensors else {}
    try:
        return read_scheduler_config({**SCHEDULER, "prediction_type": predicts, **marks})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _step(tensors: Mapping[str, Loader]) -> int | None:
    return int(tensors["global_step"]()) if "global_step" in tensors else None


def _loader(load: Loader, target: Target) -> Loader:
    def cut():
        array = load()
        if target.third is not None:
            rows = array.shape[0] // 3
            array = array[target.third * rows : (target.third + 1) * rows]
        return array.T if target.transpose else array

    return cut


def _text_width(tensors: Mapping[str, Loader], path: Path) -> int:
    keys: Iterator[str] = (
        name
        for name in tensors
        if name.startswith("model.diffusion_model.") and name.endswith("attn2.to_k.weight")
    )
    first = next(keys, None)
    if first is None:
        raise UserError(
            f"{path}: no cross-attention under model.diffusion_model., expected an original Stable "
            "Diffusion 1.x, 2.x or XL file"
        )
    return int(tensors[first]().shape[1])


def _family(width: int, path: Path) -> Configs:
    if width not in FAMILIES:
        raise UserError(f"{path}: text states of width {width}, expected one of {sorted(FAMILIES)}")
    return FAMILIES[width]
