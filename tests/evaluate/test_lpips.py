import importlib.util
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.judges import lpips
from hyperlora_jax.lora_files import safetensors_io

torch = pytest.importorskip("torch")

TOOL = Path(__file__).parents[2] / "tools" / "convert_lpips.py"
ALEXNET = [(64, 11, 4, 2), "pool", (192, 5, 1, 2), "pool", (384, 3, 1, 1), (256, 3, 1, 1)]
PLANS = {
    "alexnet": ([*ALEXNET, (256, 3, 1, 1)], 3, (0, 1, 2, 3, 4)),
    "vgg16": (
        [
            layer
            for stage in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
            for layer in [*((width, 3, 1, 1) for width in stage), "pool"]
        ][:-1],
        2,
        (1, 3, 6, 9, 12),
    ),
}


def tool():
    spec = importlib.util.spec_from_file_location("convert_lpips", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(name):
    """The classifier's layers as torchvision numbers them, and the rectified layers looked at."""
    plan, pool, taps = PLANS[name]
    layers, channels, looked_at = [], 3, []
    for layer in plan:
        if layer == "pool":
            layers.append(torch.nn.MaxPool2d(pool, 2))
            continue
        width, side, stride, padding = layer
        layers.append(torch.nn.Conv2d(channels, width, side, stride, padding))
        looked_at.append(len(layers))
        layers.append(torch.nn.ReLU())
        channels = width
    return torch.nn.Sequential(*layers), [looked_at[k] for k in taps]


def reference(layers, taps, heads, first, second):
    """LPIPS as its paper and package define it, pictures NCHW in [-1, 1]."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    features = []
    for x in (first, second):
        x, found = (x - shift) / scale, []
        for k, layer in enumerate(layers):
            x = layer(x)
            if k in taps:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        features.append(found)
    terms = [
        ((a - b).square() * head[None, :, None, None]).sum(1).mean((1, 2))
        for a, b, head in zip(*features, heads, strict=True)
    ]
    return sum(terms)


def saved(name, folder):
    torch.manual_seed(0)
    layers, taps = network(name)
    heads = [torch.rand(layers[k - 1].out_channels) for k in taps]
    state = {f"features.{k}": v for k, v in layers.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, folder / "net.pth")
    named = {f"lin{k}.model.1.weight": head[None, :, None, None] for k, head in enumerate(heads)}
    torch.save(named, folder / "heads.pth")
    assert (
        tool().convert(folder / "net.pth", folder / "heads.pth", folder / "l.safetensors") == name
    )
    return layers, taps, heads


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_equals_pytorch(name, tmp_path):
    layers, taps, heads = saved(name, tmp_path)
    judge = lpips.load_lpips(tmp_path / "l.safetensors")
    first, second = np.random.default_rng(0).random((2, 3, 64, 64, 3)).astype(np.float32)
    nchw = [torch.from_numpy(2 * x.transpose(0, 3, 1, 2) - 1) for x in (first, second)]
    with torch.no_grad():
        expected = reference(layers, taps, heads, *nchw).numpy()
    found = judge.distance(first, second)
    assert expected.min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_what_a_distance_must_be(tmp_path):
    saved("alexnet", tmp_path)
    judge = lpips.load_lpips(tmp_path / "l.safetensors")
    random = np.random.default_rng(1)
    pictures = random.random((2, 3, 16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(judge.distance(pictures, pictures), np.zeros((2, 3)))
    steps = [pictures + level * random.standard_normal(pictures.shape) for level in (0.02, 0.2)]
    near, far = (judge.distance(np.float32(step), pictures) for step in steps)
    assert near.shape == (2, 3) and (near > 0).all() and (near < far).all()
    # Small pictures are enlarged pixel by pixel, and nothing but that.
    large = pictures.repeat(4, axis=2).repeat(4, axis=3)
    shifted = np.roll(pictures, 1, axis=2)
    found = judge.distance(np.roll(large, 4, axis=3), large)
    np.testing.assert_allclose(found, judge.distance(np.roll(pictures, 1, axis=3), pictures), 1e-5)
    assert judge.distance(shifted, pictures).min() > 0
    broken = pictures.copy()
    broken[0, 0] = np.nan
    assert np.isfinite(judge.distance(broken, pictures)).all()
    halves = {name: value.astype(ml_dtypes.bfloat16) for name, value in judge.weights.items()}
    safetensors_io.write(tmp_path / "half.safetensors", halves, {})
    half = lpips.load_lpips(tmp_path / "half.safetensors").distance(steps[1], pictures)
    np.testing.assert_allclose(half, far, rtol=0.1)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected a \.safetensors file"):
        lpips.load_lpips(tmp_path / "missing")
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="1 tensors of neither alexnet nor vgg16"):
        lpips.load_lpips(tmp_path / "other.safetensors")
    (tmp_path / "weights.ckpt").write_bytes(pickle.dumps({"a": np.zeros(3)}))
    with pytest.raises(UserError, match=r"refused \(Weights only load failed.*weights_only=True"):
        tool().convert(tmp_path / "weights.ckpt", tmp_path / "weights.ckpt", tmp_path / "out")
    torch.save({"features.0.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "net.pth")
    with pytest.raises(UserError, match="1 convolutions and 0 heads are neither"):
        tool().convert(tmp_path / "net.pth", tmp_path / "net.pth", tmp_path / "out")
