"""A hypernetwork as one ONNX file: pictures → LoRAs as flat vectors, the encoder included.

    pictures    [l, k, h, w, 3] in [0, 1]; l subjects with k pictures each, both free
    noise       [l, 1 + s, z], standard normal, of generators that draw
    lora        [l, d], of strength 1
    familiarity [l], where the checkpoint knows it

Beside it lies a JSON file that says how a vector is cut into the matrices of layers; the ONNX file
holds the same text as its metadata "hyperlora".
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.encoders.foreign_encoders import ForeignImageEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.runtime.pytorch_folder import write_pytorch

NAME, BESIDE, METADATA = "hypernetwork.onnx", "hypernetwork.json", "hyperlora"
TOLERANCE = 1e-5  # of the largest number, against PyTorch


def write_onnx(hyper: Hypernetwork, out: epath.PathLike) -> None:
    """Writes the folder, after onnxruntime has given what PyTorch gives.

    Raises:
        UserError: PyTorch, onnxscript or onnxruntime is missing; an encoder that is an ONNX file
            itself; what `write_pytorch` raises.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import torch

        from hyperlora_jax.runtime.generate_lora import LoraGenerator
    except ImportError as error:
        raise UserError(
            f"--format onnx: {error.name} is not installed; pip install 'hyperlora-jax[torch,onnx]'"
        ) from error
    if isinstance(hyper.encoder, ForeignImageEncoder):
        raise UserError(
            f"encoder {hyper.encoder.name}: is an ONNX file itself, expected one of ours or CLIP; "
            "--format pytorch runs it beside the network"
        )
    with tempfile.TemporaryDirectory() as scratch:
        write_pytorch(hyper, scratch)
        network = LoraGenerator(scratch).eval()
        config = json.loads((Path(scratch) / "config.json").read_text())
        layout = {name: config[name] for name in ("family", "strength", "sites", "draw")}
        if "steps" in network.weights:  # numbers, not tensors that a graph would read them from
            tables = network.weights["steps"]
            network.weights["steps"] = {name: table.numpy() for name, table in tables.items()}
        inputs = _example(config, 2, 3)
        made = Path(scratch) / NAME
        with torch.no_grad():
            _export(network, inputs, made, json.dumps(layout))
            _check(network, _example(config, 3, 1), made)
        with storage.writing(out, storage.scratch(out)) as folder:
            safetensors_io.atomic_write(folder / NAME, made.read_bytes())
            text = json.dumps(layout, indent=1) + "\n"
            safetensors_io.atomic_write(folder / BESIDE, text.encode())


def _example(config: dict[str, Any], subjects: int, pictures: int) -> dict[str, Any]:
    import torch

    random = np.random.default_rng(0)
    shape = (subjects, pictures, *config["encoder"]["image_size"], 3)
    found = {"pictures": torch.from_numpy(random.uniform(size=shape).astype(np.float32))}
    if config["noise_size"]:
        draw = config["draw"]
        fresh = draw["num_steps"] if draw["sampler"] == "ancestral" else 0
        noise = random.normal(size=(subjects, 1 + fresh, config["noise_size"]))
        found["noise"] = torch.from_numpy(noise.astype(np.float32))
    return found


def _export(network: Any, inputs: dict[str, Any], file: Path, layout: str) -> None:
    import torch

    subjects, pictures = torch.export.Dim("subjects"), torch.export.Dim("pictures")
    free = {"pictures": {0: subjects, 1: pictures}, "noise": {0: subjects}}
    with warnings.catch_warnings():  # that both inputs have one number of subjects
        warnings.filterwarnings("ignore", ".*axis name: subjects will not be used")
        program = torch.onnx.export(
            network,
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes={name: free[name] for name in inputs},
            input_names=[*inputs],
            output_names=["lora", "familiarity"] if "familiarity" in network.weights else ["lora"],
            verbose=False,
        )
    program.model.metadata_props[METADATA] = layout
    program.save(file)


def _check(network: Any, inputs: dict[str, Any], file: Path) -> None:
    """Raises UserError where onnxruntime gives something else than PyTorch."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise UserError(
            f"--format onnx: onnxruntime does not run what was exported ({storage.reason(error)})"
        ) from error
    expected = network(**inputs)[0].numpy()
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if not difference <= TOLERANCE:
        raise UserError(
            f"--format onnx: onnxruntime differs from PyTorch by {difference:.1e} of the largest "
            f"number, expected {TOLERANCE:.0e}"
        )
