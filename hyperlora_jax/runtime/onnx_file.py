"""A hypernetwork as one ONNX file: pictures → LoRAs as flat vectors, the encoder included.

    pictures    [l, k, h, w, 3] in [0, 1]; l subjects with k pictures each, both free
    noise       [l, 1 + s, z], standard normal, of generators that draw
    lora        [l, d], of strength 1
    familiarity [l], where the checkpoint knows it

Beside it lies a JSON file that says how a vector is cut into the matrices of layers; the ONNX file
holds the same text as its metadata "hyperlora". An encoder that is an ONNX file itself is put
between the two graphs that are made here, whatever wrote it.
"""

import json
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.runtime import exporters

if TYPE_CHECKING:
    import onnx
    import torch

    from hyperlora_jax.runtime.generate_lora import LoraGenerator
from hyperlora_jax.runtime.pytorch_folder import write_pytorch

GIVEN = ["pooled", "tokens"]  # what an encoder gives
NAME, BESIDE, METADATA = "hypernetwork.onnx", "hypernetwork.json", "hyperlora"
OPSET = 18  # or a foreign encoder's, where that is higher


def write_onnx(hyper: Hypernetwork, out: epath.PathLike) -> None:
    """Writes the folder, after onnxruntime has given what PyTorch gives.

    Raises:
        UserError: PyTorch, onnxscript or onnxruntime is missing; an ONNX encoder that does not take
            any number of pictures; what `write_pytorch` raises.
    """
    what = "--format onnx"
    with (
        tempfile.TemporaryDirectory() as scratch,
        exporters.exporting(what, "torch", "onnxscript", "onnxruntime"),
    ):
        import torch

        from hyperlora_jax.runtime.generate_lora import LoraGenerator

        write_pytorch(hyper, scratch)
        network = LoraGenerator(scratch).eval()
        layout = {name: network.config[name] for name in ("family", "strength", "sites", "draw")}
        text = json.dumps(layout, indent=1) + "\n"
        if "steps" in network.weights:  # numbers, not tensors that a graph would read them from
            tables = network.weights["steps"]
            network.weights["steps"] = {name: table.numpy() for name, table in tables.items()}
        inputs = _example(network.config, 3, 1)
        with torch.no_grad():
            wanted = network(**inputs)[:1]
            model = _model(network)
        model.metadata_props.add(key=METADATA, value=json.dumps(layout))
        data = model.SerializeToString()
        given = {name: value.numpy() for name, value in inputs.items()}
        exporters.check(what, data, given, [x.numpy() for x in wanted])
        with storage.writing(out, storage.scratch(out)) as folder:
            safetensors_io.atomic_write(folder / NAME, data)
            safetensors_io.atomic_write(folder / BESIDE, text.encode())


def _example(config: Json, subjects: int, pictures: int) -> "dict[str, torch.Tensor]":
    import torch

    random = np.random.default_rng(0)
    shape = (subjects, pictures, *config["encoder"]["image_size"], 3)
    inputs = {"pictures": torch.from_numpy(random.uniform(size=shape).astype(np.float32))}
    if config["noise_size"]:
        draw = config["draw"]
        fresh = draw["num_steps"] if draw["sampler"] == "ancestral" else 0
        noise = random.normal(size=(subjects, 1 + fresh, config["noise_size"]))
        inputs["noise"] = torch.from_numpy(noise.astype(np.float32))
    return inputs


def _model(network: "LoraGenerator") -> "onnx.ModelProto":
    """The graph of a `LoraGenerator`; where its encoder is an ONNX file, with that before it."""
    import torch

    inputs = _example(network.config, 2, 3)
    subjects, pictures = torch.export.Dim("subjects"), torch.export.Dim("pictures")
    free = {"pictures": {0: subjects, 1: pictures}, "noise": {0: subjects}}
    outputs = ["lora", "familiarity"] if "familiarity" in network.weights else ["lora"]
    if network.config["encoder"]["kind"] != "onnx":
        return exporters.onnx_model(
            network, inputs, free, ([*inputs], outputs), opset_version=OPSET
        )
    from hyperlora_jax.runtime.generate_lora import onnx_encoder

    own, config = network.weights.pop("encoder"), network.config["encoder"]
    pooled, tokens = onnx_encoder(own, config, torch.zeros(6, 3, *config["image_size"]))
    # The same with what an encoder gives, (pooled [l, k, e], tokens [l, k, n, e]), for pictures.
    inputs["pictures"] = tuple(y.unflatten(0, (2, 3)) for y in (pooled, tokens))
    free["pictures"] = (free["pictures"],) * 2
    network.embed = lambda given: (given[0].mean(1), given[1].flatten(1, 2))
    encoder = _read(own["file"], config["name"])
    (opset,) = (known.version for known in encoder.opset_import if known.domain == "")
    names = [*GIVEN, *(name for name in inputs if name != "pictures")], outputs
    rest = exporters.onnx_model(network, inputs, free, names, opset_version=opset)
    shape = tuple(tokens.shape[1:])
    return _joined(encoder, rest, config, [network.weights[k] for k in ("mean", "std")], shape)


def _read(file: str, name: str) -> "onnx.ModelProto":
    """The encoder's model, of a version that PyTorch exports to."""
    import onnx

    model = onnx.load(file)
    if (count := model.graph.input[0].type.tensor_type.shape.dim[0].dim_value) > 0:
        raise UserError(
            f"encoder {name}: takes {count} pictures at a time, expected any number (its first "
            "axis free); --format pytorch runs it"
        )
    versions = {opset.domain: opset.version for opset in model.opset_import}
    if versions.get("", 1) < OPSET:
        model = onnx.version_converter.convert_version(model, OPSET)
    return model


def _joined(
    encoder: "onnx.ModelProto",
    rest: "onnx.ModelProto",
    config: Json,
    statistics: "Sequence[torch.Tensor]",
    tokens: tuple[int, int],
) -> "onnx.ModelProto":
    """pictures → pixels → encoder → its outputs by subject and picture → rest."""
    import onnx

    encoder.ir_version = rest.ir_version
    (opset,) = (known.version for known in encoder.opset_import if known.domain == "")
    versions = f'<ir_version: {rest.ir_version}, opset_import: ["" : {opset}]>'
    (height, width), (count, size) = config["image_size"], tokens
    mean, std = (", ".join(map(repr, x.expand(3).tolist())) for x in statistics)
    axes = "0, 3, 1, 2" if config["channels_first"] else "0, 1, 2, 3"
    front = onnx.parser.parse_model(
        f"""{versions} front (float[subjects, pictures, {height}, {width}, 3] pictures)
        => (float[b, x, y, z] given_pixels, int64[2] given_lead)
        <float[3] given_mean = {{{mean}}}, float[3] given_std = {{{std}}},
         int64[4] given_shape = {{-1, {height}, {width}, 3}}>
        {{
          given_each = Reshape(pictures, given_shape)
          given_centred = Sub(given_each, given_mean)
          given_normal = Div(given_centred, given_std)
          given_pixels = Transpose<perm = [{axes}]>(given_normal)
          given_lead = Shape<start = 0, end = 2>(pictures)
        }}"""
    )
    back = onnx.parser.parse_model(
        f"""{versions} back (float[b, {size}] one, float[b, n, {size}] many, int64[2] lead)
        => (float[l, k, {size}] pooled, float[l, k, {count}, {size}] tokens)
        <int64[1] width = {{{size}}}, int64[2] rest = {{{count}, {size}}}>
        {{
          of_pooled = Concat<axis = 0>(lead, width)
          of_tokens = Concat<axis = 0>(lead, rest)
          pooled = Reshape(one, of_pooled)
          tokens = Reshape(many, of_tokens)
        }}"""
    )
    if len(config["outputs"]) == 1:  # the embedding is the only token
        back.graph.node[-1].input[0] = "one"
        del back.graph.input[1]
    merge, pixels = onnx.compose.merge_models, [("given_pixels", config["input"])]
    outputs = ["given_lead", *(f"encoder/{name}" for name in config["outputs"])]
    model = merge(front, encoder, pixels, outputs=outputs, prefix2="encoder/")
    pairs = list(zip(outputs, ("lead", "one", "many"), strict=False))
    model = merge(model, back, pairs, prefix2="between/")
    return merge(model, rest, [(f"between/{name}", name) for name in GIVEN])
