import json

import numpy as np
import pytest

from hyperlora_jax.encoders.clip_encoder import ClipImageEncoder
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError

IMAGES = np.random.default_rng(0).random((3, 12, 12, 3)).astype(np.float32)
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def save(folder, kind, **changes):
    torch = pytest.importorskip("torch")
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32,
        image_size=12, patch_size=4, projection_dim=10, **changes,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(0.2 * noise + float("norm.weight" in name or "layrnorm.weight" in name))
    model.save_pretrained(folder)
    values = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return model


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_equals_transformers(tmp_path, kind):
    import torch

    model = save(tmp_path, kind, hidden_act="gelu" if kind == "CLIPVisionModel" else "quick_gelu")
    encoder = load_condition_encoder(tmp_path)
    assert isinstance(encoder, ClipImageEncoder) and isinstance(encoder, ImageEncoder)
    pixels = (IMAGES - np.float32(MEAN)) / np.float32(STD)
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    projects = kind.endswith("Projection")
    pooled = (theirs.image_embeds if projects else theirs.pooler_output).numpy()
    found, tokens = encoder.encode(IMAGES)
    assert np.abs(found - pooled).max() <= 1e-4 * np.abs(pooled).max()
    assert encoder.embedding_dim == found.shape[1] == tokens.shape[2]
    assert tokens.shape[1] == encoder.num_tokens == 10 and encoder.image_size == (12, 12)
    if projects:
        np.testing.assert_allclose(tokens[:, 0], found, atol=1e-6)
    else:
        np.testing.assert_allclose(tokens, theirs.last_hidden_state.numpy(), atol=1e-4)
    assert encoder.hash == load_condition_encoder(tmp_path).hash


def test_what_is_not_supported_is_named(tmp_path):
    save(tmp_path, "CLIPVisionModel")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for changes, message in (
        ({"rope": 1}, "key 'rope'"),
        ({"hidden_act": "swiglu"}, "hidden_act = 'swiglu'"),
        ({"num_hidden_layers": 3}, r"16 tensors are missing, first"),
    ):
        file.write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=message):
            load_condition_encoder(tmp_path)
