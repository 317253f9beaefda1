"""Makes an ONNX file of the face descriptor in the npm package @vladmandic/face-api.

    python tools/convert_face_judge.py face_recognition_model-weights_manifest.json judge.onnx

The model is dlib's residual network: 150 x 150 pixels to 128 numbers. Its weights are one file of
bytes beside a JSON manifest that says name, shape, scale and smallest value of every tensor. The
ONNX file takes pixels normalised to (pixel - .5) / .5, as our encoders do, and holds the rest.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hyperlora_jax.errors import UserError

SIZE, WIDTH = 150, 128
MEAN = (122.782, 117.001, 104.298)  # of red, green and blue, 0 to 255
STAGES = (("conv32", 3), ("conv64", 3), ("conv128", 2), ("conv256", 2))  # name, plain blocks


class Graph:
    """Nodes and weights, collected."""

    def __init__(self, tensors):
        self.tensors, self.nodes, self.weights = tensors, [], []

    def add(self, kind, *inputs, **attributes):
        """A node; returns its output."""
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, values):
        """A constant; returns its name."""
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def convolution(self, x, name, stride=1, relu=True):
        """Convolution, bias and scale (folded into it); stride 2 is without padding."""
        filters, bias = (self.tensors[f"{name}/conv/{part}"] for part in ("filters", "bias"))
        scale, shift = (self.tensors[f"{name}/scale/{part}"] for part in ("weights", "biases"))
        kernel = self.constant((filters * scale).transpose(3, 2, 0, 1))
        pads = [(filters.shape[0] - 1) // 2 if stride == 1 else 0] * 4
        offset = self.constant(bias * scale + shift)
        x = self.add("Conv", x, kernel, offset, strides=[stride] * 2, pads=pads)
        return self.add("Relu", x) if relu else x

    def residual(self, x, name, side, width, down=False):
        """One residual block of `side` pixels; returns its output, side and width.

        Going down, the shortcut is halved by averaging and filled up with empty channels, and the
        main path is filled up with a row and a column where it came out smaller.
        """
        y = self.convolution(x, f"{name}/conv1", 2 if down else 1)
        y = self.convolution(y, f"{name}/conv2", relu=False)
        wanted = self.tensors[f"{name}/conv2/conv/bias"].shape[0]
        if down:
            x = self.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
            inner, side = (side - 3) // 2 + 1, side // 2
            y = self.padded(y, (0, 0, side - inner, side - inner))
            x = self.padded(x, (0, wanted - width, 0, 0))
        return self.add("Relu", self.add("Add", x, y)), side, wanted

    def padded(self, x, after):
        """Zeros after the end of every axis."""
        return self.add("Pad", x, self.constant(np.array([0] * 4 + list(after), np.int64)))


def read_tensors(manifest: Path) -> dict[str, np.ndarray]:
    """Float32 tensors by name.

    Raises:
        UserError: files that are missing or of another form.
    """
    try:
        (group,) = json.loads(manifest.read_text())
        data = b"".join((manifest.parent / name).read_bytes() for name in group["paths"])
        found, start = {}, 0
        for entry in group["weights"]:
            plain = {"dtype": entry["dtype"], "scale": 1.0, "min": 0.0}
            coded = entry.get("quantization", plain)
            count = int(np.prod(entry["shape"]))
            values = np.frombuffer(data, coded["dtype"], count, start).astype(np.float32)
            found[entry["name"]] = (values * coded["scale"] + coded["min"]).reshape(entry["shape"])
            start += count * np.dtype(coded["dtype"]).itemsize
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{manifest}: cannot be read ({type(error).__name__}: {error}), expected a weights "
            "manifest with one group of tensors"
        ) from error
    if start != len(data):
        raise UserError(f"{manifest}: describes {start} of {len(data)} bytes")
    return {name: np.float32(value) for name, value in found.items()}


def build(tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model; input "pixels" [b, 3, 150, 150], output "descriptor" [b, 128]."""
    graph = Graph(tensors)
    # (127.5 p + 127.5 - mean) / 255, p the normalised pixel.
    offset = graph.constant(((127.5 - np.array(MEAN)) / 255).astype(np.float32)[:, None, None])
    x = graph.add("Add", graph.add("Mul", "pixels", graph.constant(np.float32(0.5))), offset)
    x = graph.convolution(x, "conv32_down", 2)
    x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2])
    side, width = ((SIZE - 7) // 2 + 1 - 3) // 2 + 1, 32
    for stage, blocks in STAGES:
        if stage != "conv32":
            x, side, width = graph.residual(x, f"{stage}_down", side, width, down=True)
        for k in range(1, blocks + 1):
            x, side, width = graph.residual(x, f"{stage}_{k}", side, width)
    x, side, width = graph.residual(x, "conv256_down_out", side, width, down=True)
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    graph.nodes.append(
        helper.make_node("MatMul", [x, graph.constant(tensors["fc"])], ["descriptor"])
    )
    made = helper.make_graph(
        graph.nodes,
        "face-descriptor",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["b", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("descriptor", TensorProto.FLOAT, ["b", WIDTH])],
        graph.weights,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> int:
    """Exit code 0, or 2 with one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    try:
        onnx.save(build(read_tensors(given.manifest)), given.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
