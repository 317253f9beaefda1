import json
import sys

import numpy as np
import pytest

from hyperlora_jax.encoders.clip_encoder import ClipImageEncoder, save_clip_vision
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from tests import user_world

IMAGES = np.random.default_rng(0).random((3, 12, 12, 3)).astype(np.float32)


def save_onnx(path, shape=(None, 3, 8, 8), outputs=("pooled",), batch="b"):
    """A model whose embedding is the mean colour of the whole picture (and of its rows)."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    dims = [batch if d is None else d for d in shape]
    spatial = (2, 3) if shape[1] == 3 else (1, 2)
    nodes, described = [], []
    if "pooled" in outputs:
        axes = helper.make_tensor("axes", TensorProto.INT64, [2], spatial)
        nodes.append(helper.make_node("ReduceMean", ["x", "axes"], ["pooled"], keepdims=0))
        described.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [dims[0], 3]))
        constants = [axes]
    else:
        nodes.append(helper.make_node("Identity", ["x"], ["same"]))
        described.append(helper.make_tensor_value_info("same", TensorProto.FLOAT, dims))
        constants = []
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
    graph = helper.make_graph(nodes, "g", [entry], described, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture(autouse=True)
def need_onnxruntime(request):
    if "onnx" in request.node.name:
        pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("shape", [(None, 3, 6, 6), (None, 6, 6, 3)])
@pytest.mark.parametrize("batch", ["b", 1])
def test_onnx(tmp_path, shape, batch):
    path = save_onnx(tmp_path / "mean.onnx", shape, batch=batch)
    encoder = load_condition_encoder(path, mean=(0.5, 0.4, 0.3), std=(2.0,))
    assert isinstance(encoder, ImageEncoder) and encoder.embedding_dim == 3
    pooled, tokens = encoder.encode(IMAGES)
    expected = (IMAGES.mean(axis=(1, 2)) - np.array([0.5, 0.4, 0.3])) / 2.0
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    np.testing.assert_allclose(tokens[:, 0], pooled)
    assert encoder.image_size == (6, 6) and encoder.num_tokens == 1


def test_onnx_with_open_size(tmp_path):
    path = save_onnx(tmp_path / "open.onnx", ("b", 3, "h", "w"))
    with pytest.raises(UserError, match="leaves its image size open"):
        load_condition_encoder(path)
    encoder = load_condition_encoder(path, image_size=4)
    assert encoder.encode(IMAGES)[0].shape == (3, 3)
    assert load_condition_encoder(path, image_size=(4, 6)).image_size == (4, 6)
    values = {"size": {"shortest_edge": 6}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    beside = load_condition_encoder(path)
    assert beside.image_size == (6, 6) and beside.preprocessing.mean == (0.1, 0.2, 0.3)
    assert load_condition_encoder(path, image_size=4, mean=0.5).image_size == (4, 4)


def test_size_that_a_model_says_itself(tmp_path):
    """An ONNX file of a fixed size and a ViT refuse another; a processor's size is a default."""
    pytest.importorskip("onnxruntime")
    fixed = save_onnx(tmp_path / "fixed.onnx")
    assert load_condition_encoder(fixed, image_size=8).image_size == (8, 8)
    with pytest.raises(UserError, match=r"image_size is \(9, 9\), but the model takes \(8, 8\)"):
        load_condition_encoder(fixed, image_size=9)
    pytest.importorskip("torch")
    folder = user_world.write_vit(tmp_path / "vit")
    with pytest.raises(UserError, match="does not take pictures of 24x24 pixels"):
        load_condition_encoder(folder, image_size=24)
    values = {"crop_size": 20, "do_center_crop": True, "size": {"shortest_edge": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    assert load_condition_encoder(folder).image_size == (20, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.1, 0.2)}, "mean is .*expected one finite number or three"),
        ({"std": 0.0}, r"std is 0\.0, expected one finite number or three, above 0"),
        ({"std": float("nan")}, "std is nan"),
        ({"image_size": (1, 2, 3)}, "expected one or two numbers of pixels"),
        ({"image_size": 0}, "image_size is 0"),
        ({"colour": 1}, "unknown option 'colour'"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        load_condition_encoder(tmp_path / "x.onnx", **options)
    with pytest.raises(UserError, match="is one of ours, takes no mean"):
        load_condition_encoder("avatar", mean=0.5)


def test_onnx_refused(tmp_path, monkeypatch):
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is no ONNX model"):
        load_condition_encoder(tmp_path / "bad.onnx")
    with pytest.raises(UserError, match="input has shape"):
        load_condition_encoder(save_onnx(tmp_path / "grey.onnx", (None, 1, 8, 8)))
    with pytest.raises(UserError, match="outputs have shapes"):
        load_condition_encoder(save_onnx(tmp_path / "same.onnx", outputs=()))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs onnxruntime"):
        load_condition_encoder(tmp_path / "bad.onnx")


def test_transformers_vision_models(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=8, image_size=12, patch_size=4)
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    encoder = load_condition_encoder(tmp_path)
    pooled, tokens = encoder.encode(IMAGES)
    pixels = (IMAGES - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 0.6, 0.7])
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(tokens, expected.last_hidden_state.numpy(), atol=1e-5)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), atol=1e-5)
    assert isinstance(encoder, ImageEncoder) and encoder.embedding_dim == 16
    assert encoder.image_size == (12, 12) and encoder.num_tokens == tokens.shape[1]
    assert encoder.hash == load_condition_encoder(tmp_path).hash


def test_clip_gives_its_projected_embedding(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    shared = {"num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 6}
    vision = {"hidden_size": 8, "intermediate_size": 8, "image_size": 12, "patch_size": 6}
    text = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 20}
    config = transformers.CLIPConfig(
        text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=6
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    encoder = load_condition_encoder(tmp_path)
    pixels = torch.from_numpy(((IMAGES - 0.5) / 0.5).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        pooled = model.visual_projection(model.vision_model(pixels).pooler_output)
    found, tokens = encoder.encode(IMAGES)
    np.testing.assert_allclose(found, pooled.numpy(), atol=1e-5)
    np.testing.assert_allclose(tokens[:, 0], found, atol=1e-5)
    assert isinstance(encoder, ClipImageEncoder)  # the half that sees, without its texts
    save_clip_vision(tmp_path / "copy", encoder)
    assert load_condition_encoder(tmp_path / "copy").hash == encoder.hash


def test_transformers_refused(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    import transformers

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no transformers vision model"):
        load_condition_encoder(tmp_path)
    text = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    transformers.BertModel(text).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected a vision model"):
        load_condition_encoder(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs PyTorch"):
        load_condition_encoder(tmp_path)
