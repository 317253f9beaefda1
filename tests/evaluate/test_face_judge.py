"""`tools/convert_face_judge.py` against the same network written with PyTorch, random weights."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TOOL = Path(__file__).parents[2] / "tools" / "convert_face_judge.py"
BLOCKS = [("conv32_1", 32, 32), ("conv32_2", 32, 32), ("conv32_3", 32, 32)]
for before, width, plain in ((32, 64, 3), (64, 128, 2), (128, 256, 2)):
    BLOCKS.append((f"conv{width}_down", before, width))
    BLOCKS += [(f"conv{width}_{k + 1}", width, width) for k in range(plain)]
BLOCKS.append(("conv256_down_out", 256, 256))


def tool():
    spec = importlib.util.spec_from_file_location("convert_face_judge", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layers():
    """(name, kernel side, inputs, outputs) of every convolution."""
    found = [("conv32_down", 7, 3, 32)]
    for name, before, width in BLOCKS:
        found += [(f"{name}/conv1", 3, before, width), (f"{name}/conv2", 3, width, width)]
    return found


@pytest.fixture(name="tensors", scope="module")
def _tensors():
    random, found = np.random.default_rng(0), {}
    for name, side, inputs, outputs in layers():
        spread = 1 / np.sqrt(side * side * inputs)
        found[f"{name}/conv/filters"] = random.normal(0, spread, (side, side, inputs, outputs))
        for part, middle in (("conv/bias", 0), ("scale/weights", 1), ("scale/biases", 0)):
            found[f"{name}/{part}"] = random.normal(middle, 0.1, outputs)
    found["fc"] = random.normal(0, 0.1, (256, 128))
    return {name: np.float32(value) for name, value in found.items()}


def write(folder, tensors, coded=()):
    """A manifest; tensors named in `coded` as bytes, the others as floats."""
    entries, data = [], b""
    for name, value in tensors.items():
        entry = {"name": name, "shape": list(value.shape), "dtype": "float32"}
        if name in coded:
            low, scale = float(value.min()), float(np.ptp(value)) / 255
            entry["quantization"] = {"dtype": "uint8", "scale": scale, "min": low}
            value = np.uint8(np.round((value - low) / scale))
        data += value.tobytes()
        entries.append(entry)
    (folder / "model.bin").write_bytes(data)
    file = folder / "manifest.json"
    file.write_text(json.dumps([{"paths": ["model.bin"], "weights": entries}]))
    return file


def reference(tensors, pictures):
    """Descriptors of pictures [b, 150, 150, 3] in [0, 1]."""

    def convolution(x, name, stride):
        kernel = torch.from_numpy(tensors[f"{name}/conv/filters"].transpose(3, 2, 0, 1).copy())
        bias = torch.from_numpy(tensors[f"{name}/conv/bias"])
        x = torch.nn.functional.conv2d(x, kernel, bias, stride, 1 if stride == 1 else 0)
        scale, shift = (
            torch.from_numpy(tensors[f"{name}/scale/{p}"]) for p in ("weights", "biases")
        )
        return x * scale[:, None, None] + shift[:, None, None]

    mean = torch.tensor([122.782, 117.001, 104.298])
    x = ((torch.from_numpy(pictures) * 255 - mean) / 255).permute(0, 3, 1, 2)
    x = torch.nn.functional.max_pool2d(convolution(x, "conv32_down", 2).relu(), 3, 2)
    for name, before, width in BLOCKS:
        down = "down" in name
        y = convolution(
            convolution(x, f"{name}/conv1", 2 if down else 1).relu(), f"{name}/conv2", 1
        )
        if down:
            x = torch.nn.functional.avg_pool2d(x, 2, 2)
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, width - before))
            y = torch.nn.functional.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2]))
        x = (x + y).relu()
    return (x.mean((2, 3)) @ torch.from_numpy(tensors["fc"])).numpy()


def test_equals_pytorch(tensors, tmp_path):
    import onnx

    onnx.save(tool().build(tool().read_tensors(write(tmp_path, tensors))), tmp_path / "judge.onnx")
    judge = load_condition_encoder(tmp_path / "judge.onnx")
    pictures = np.random.default_rng(1).random((2, 150, 150, 3)).astype(np.float32)
    found, _ = judge.encode(pictures)
    expected = reference(tensors, pictures)
    assert np.abs(expected).max() > 0.1 and judge.embedding_dim == 128
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_bytes_are_decoded(tensors, tmp_path):
    few = {
        name: tensors[name] for name in ("fc", "conv32_down/conv/bias", "conv32_1/conv1/conv/bias")
    }
    found = tool().read_tensors(write(tmp_path, few, coded=("fc",)))
    np.testing.assert_array_equal(found["conv32_down/conv/bias"], few["conv32_down/conv/bias"])
    step = np.ptp(few["fc"]) / 255
    np.testing.assert_allclose(found["fc"], few["fc"], atol=0.51 * step)


def test_refused(tensors, tmp_path):
    file = write(tmp_path, {"fc": tensors["fc"]})
    (tmp_path / "model.bin").write_bytes(tensors["fc"].tobytes() + b"more")
    with pytest.raises(UserError, match="describes 131072 of 131076 bytes"):
        tool().read_tensors(file)
    (tmp_path / "model.bin").write_bytes(b"less")
    with pytest.raises(UserError, match=r"cannot be read .ValueError"):
        tool().read_tensors(file)
