import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hyperlora_jax.encoders import condition_encoders
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.encoders.image_encoder import ConvEncoder, init_encoder
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError

SMALL = ConvEncoder(image_size=8, widths=(8, 16), embedding_dim=12, pool_channels=4, groups=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    params = init_encoder(SMALL, jax.random.key(0))
    condition_encoders.save_encoder(path, SMALL, params, "tiny", {"steps": 3})
    return path


def test_flax_round_trip(folder):
    encoder = load_condition_encoder(folder)
    assert isinstance(encoder, ImageEncoder)
    assert (encoder.name, encoder.embedding_dim, encoder.facts) == ("tiny", 12, {"steps": 3})
    assert encoder.image_size == (8, 8)
    pooled, tokens = encoder.encode(np.ones((2, 8, 8, 3), np.float32))
    assert pooled.shape == (2, 12) and tokens.shape == (2, encoder.num_tokens, 12)


def test_encode_inside_jit(folder):
    encoder = load_condition_encoder(folder)
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    inside = jax.jit(lambda x: encoder.encode(x)[0])(images)
    np.testing.assert_allclose(inside, encoder.encode(images)[0], atol=1e-5)


def test_hash_follows_the_weights(folder, tmp_path):
    first = load_condition_encoder(folder)
    assert first.hash == load_condition_encoder(folder).hash
    params = init_encoder(SMALL, jax.random.key(1))
    returned = condition_encoders.save_encoder(tmp_path, SMALL, params, "other")
    assert returned == load_condition_encoder(tmp_path).hash != first.hash


def test_bad_folders(folder, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load_condition_encoder(tmp_path / "nothing")
    with pytest.raises(UserError, match="found no config"):
        load_condition_encoder(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"found a \.bin file"):
        load_condition_encoder(tmp_path / "x.bin")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_condition_encoder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="found list"):
        load_condition_encoder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be read"):
        load_condition_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "version": 9}))
    with pytest.raises(UserError, match="version 9"):
        condition_encoders.load_encoder(tmp_path)


def test_weights_that_do_not_fit(folder, tmp_path):
    flat = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    bad = dict(flat)
    bad["stem/bias"] = np.zeros(5, np.float16)
    save_file(bad, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor stem/bias has shape \(5,\)"):
        load_condition_encoder(tmp_path)
    del bad["stem/bias"]
    save_file(bad, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensor stem/bias is missing"):
        load_condition_encoder(tmp_path)
    save_file({**flat, "extra": np.zeros(1, np.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensor extra is unknown"):
        load_condition_encoder(tmp_path)
    config["module"]["colour"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not describe one"):
        load_condition_encoder(tmp_path)
