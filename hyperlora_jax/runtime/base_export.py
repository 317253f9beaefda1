"""A base model's UNet with LoRA inputs in one graph: ONNX, or PyTorch's own exported program.

The folder holds the graph, the UNet's config.json, `lora.json` (where which factor lies in the flat
vector, and what LoRA files call it) and `lora_unet.py`, which runs the graph where this package is
not installed.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from hyperlora_jax import storage
from hyperlora_jax.array_types import JsonDict
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.lora_files.base_files import weight_files
from hyperlora_jax.lora_files.writing import kohya_names
from hyperlora_jax.runtime.exporters import exporting
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.weights import directory

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch.export import ExportedProgram
from hyperlora_jax.stable_diffusion.weights.tensor_stream import read_tensors

Format = Literal["onnx", "torch-export"]
FORMATS: tuple[Format, ...] = get_args(Format)
GRAPHS = {"onnx": "model.onnx", "torch-export": "model.pt2"}
PACKAGES = {"onnx": ("torch", "diffusers", "onnx", "onnxscript"),
            "torch-export": ("torch", "diffusers")}  # fmt: skip
LAYOUT, RUNNER = "lora.json", Path(__file__).with_name("lora_unet.py")
OPSET = 18


def export_base(
    base: str, out: str | Path, format: Format, preset: str, rank: int, dtype: str = "float32"
) -> LoraSpec:
    """Writes the folder `out`; returns the spec of the LoRAs that the graph takes.

    Args:
        base: diffusers directory, single file, hub id or name of an embedded model.
        preset: of `lora.sites.PRESETS`.
        dtype: float32 or float16, of the weights and of what goes in and out.

    Raises:
        UserError: no UNet, an unknown preset, a rank below 1, weights that do not fit; PyTorch or
            what its exporter needs is not installed; the folder cannot be written.
    """
    outline = StableDiffusion.outline(base, ("unet",))
    spec = outline.lora_spec(preset, rank)
    layout = {
        "graph": GRAPHS[format],
        "dtype": dtype,
        "base": str(base),
        "base_hash": outline.base_hash,
        "preset": preset,
        "rank": rank,
        "numbers": spec.num_parameters,
        "sites": _sites(spec, outline),
    }
    with (
        storage.output(out) as folder,
        exporting(f"--format {format} of {base}", *PACKAGES[format]),
    ):
        try:
            _write(_traced(_pytorch(outline, dtype), spec, dtype), folder / GRAPHS[format])
            directory.write_json(folder / "config.json", outline.unet.config)
            (folder / LAYOUT).write_text(json.dumps(layout, indent=1) + "\n")
            shutil.copyfile(RUNNER, folder / RUNNER.name)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({storage.reason(error)})") from error
    return spec


def _sites(spec: LoraSpec, outline: StableDiffusion) -> list[JsonDict]:
    """Where the factors of each site lie in the vector, and its names in LoRA files."""
    family = "sdxl" if outline.is_xl else "sd1"  # 1.x and 2.x share their names
    names = kohya_names(spec, family, outline.unet.config.get("layers_per_block", 2))
    rows, start = [], 0
    for site in spec.sites:
        window = list(site.kernel_size) if site.kind == "conv" else []
        ends = [1] * len(window)
        row: JsonDict = {"path": site.path, "kohya": names[site.path]}
        for side, shape in (
            ("down", [site.rank, site.in_features, *window]),
            ("up", [site.out_features, site.rank, *ends]),
        ):
            row[side] = {"start": start, "shape": shape}
            start += site.rank * (site.fan_in if side == "down" else site.out_features)
        rows.append(row)
    return rows


def _pytorch(outline: StableDiffusion, dtype: str) -> "UNet2DConditionModel":
    """diffusers' UNet with the base's weights, read as every command reads them."""
    import torch
    from diffusers import UNet2DConditionModel

    folder = outline.path / "unet"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(outline.unet.config)
    state = {
        name: torch.from_numpy(load().astype(dtype))
        for name, load in read_tensors(weight_files(folder, "unet"))
    }
    try:
        unet.load_state_dict(state, assign=True)
    except RuntimeError as error:
        lines = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: PyTorch's UNet does not take its weights ({lines})") from error
    return unet.eval().requires_grad_(False)


def _traced(unet: "UNet2DConditionModel", spec: LoraSpec, dtype: str) -> "ExportedProgram":
    """The exported program; number of pictures, their size and the prompt's length are free."""
    import torch
    from torch.export import Dim

    from hyperlora_jax.runtime.lora_inputs import LoraInputs

    config, halved = unet.config, 2**unet.num_upsamplers
    rows, tokens = 2, 5  # of the example; no two sizes that are free are equal
    shapes = {
        "sample": (rows, config.in_channels, 3 * halved, 4 * halved),
        "timestep": (rows,),
        "encoder_hidden_states": (rows, tokens, config.cross_attention_dim),
        "lora": (rows, spec.num_parameters),
        "strength": (rows,),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes |= {"text_embeds": (rows, pooled), "time_ids": (rows, 6)}
    if config.time_cond_proj_dim:
        shapes["timestep_cond"] = (rows, config.time_cond_proj_dim)
    numbers = getattr(torch, dtype)
    inputs = {name: torch.zeros(shape, dtype=numbers) for name, shape in shapes.items()}
    inputs["timestep"] = inputs["timestep"].float()  # samplers also step between integers
    free = {
        "batch": Dim("batch"),
        "height": halved * Dim("rows"),
        "width": halved * Dim("columns"),
        "tokens": Dim("tokens"),
    }
    axes = {name: {axis: free[size] for axis, size in _free_axes(name).items()} for name in inputs}
    program = torch.export.export(LoraInputs(unet, spec), (), inputs, dynamic_shapes=axes)
    for node in program.graph.nodes:  # which line of which file asked for it
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(key, None)
    return program


def _free_axes(name: str) -> dict[int, str]:
    """{axis: its name} of an input's free axes."""
    others = {"sample": {2: "height", 3: "width"}, "encoder_hidden_states": {1: "tokens"}}
    return {0: "batch", **others.get(name, {})}


def _write(program: "ExportedProgram", file: Path) -> None:
    import torch

    if file.suffix == ".pt2":
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, file)
        return
    from onnxscript import optimizer

    names = program.graph_signature.user_inputs
    graph = torch.onnx.export(
        program,
        output_names=["out_sample"],  # what Optimum calls it, as the inputs' names
        dynamic_shapes={name: _free_axes(name) for name in names},
        opset_version=OPSET,
        verbose=False,
        optimize=False,  # its rewriting takes longer than all the rest, and runs no faster
    )
    optimizer.inline(graph.model)
    optimizer.fold_constants(graph.model)
    optimizer.remove_unused_nodes(graph.model)
    file.parent.mkdir(parents=True, exist_ok=True)
    graph.save(file)
