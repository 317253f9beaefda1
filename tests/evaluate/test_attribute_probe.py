import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.judges.attribute_probe import AttributeProbe
from hyperlora_jax.pretrain import probe_task
from hyperlora_jax.pretrain.render_bundle import RenderBundle

ENCODER = {"widths": (4, 8), "embedding_dim": 8, "pool_channels": 2, "groups": 4}


@pytest.fixture(scope="module")
def trained():
    bundle = RenderBundle(
        images=np.zeros((2, 2, 8, 8, 3), np.uint8),
        neutral=np.zeros((2, 8, 8, 3), np.uint8),
        identity_labels=np.zeros((2, 1), int),
        view_labels=np.zeros((2, 2, 2), int),
        identity_parts={"hair": ("a", "b")},
        view_parts={"mouth": ("x", "y", "z"), "hat": ("no", "tall")},
        facts={"style": "drawn"},
    )
    module = probe_task.make_network(bundle, ENCODER)
    return (
        bundle,
        module,
        jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"],
    )


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    bundle, _, params = trained
    path = tmp_path_factory.mktemp("probe")
    probe_task.export_probe(path, params, bundle, encoder=ENCODER, facts={"steps": 7})
    return path


def test_round_trip(trained, folder):
    _, module, params = trained
    probe = AttributeProbe.load(folder)
    assert probe.parts == {"mouth": ("x", "y", "z"), "hat": ("no", "tall")}
    assert probe.facts["steps"] == 7 and probe.facts["data"] == {"style": "drawn"}
    images = np.random.default_rng(0).random((3, 2, 8, 8, 3), np.float32)
    stored = jax.tree.map(lambda x: np.float32(np.float16(x)), params)
    logits = jax.jit(module.apply)({"params": stored}, images.reshape(6, 8, 8, 3))
    expected = np.stack([part.argmax(axis=-1) for part in logits], axis=-1).reshape(3, 2, 2)
    np.testing.assert_array_equal(probe.classes(images), expected)
    broken = images.copy()
    broken[0, 0, 0, 0, 0] = np.nan
    np.testing.assert_array_equal(probe.classes(broken)[1:], expected[1:])


def test_other_captions_are_refused(folder):
    probe = AttributeProbe.load(folder)
    probe.check_parts({"mouth": ["x", "y", "z"], "hat": ["no", "tall"]})
    with pytest.raises(UserError, match="train one for this style"):
        probe.check_parts({"mouth": ["x", "y"]})


def test_bad_folders(folder, tmp_path):
    with pytest.raises(UserError, match="found no config"):
        AttributeProbe.load(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for change, message in (
        ({"format": "other"}, "found format 'other'"),
        ({"parts": 3}, "does not describe one"),
        ({"parts": [["mouth", ["x"]], ["hat", ["no", "tall"]]]}, "has shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            AttributeProbe.load(tmp_path)
