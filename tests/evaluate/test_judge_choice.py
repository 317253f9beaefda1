import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from hyperlora_jax.encoders.condition_encoders import save_encoder
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.evaluate.judges.judges import choose_judges, same_encoder
from tests import user_world


def section(clip="", **judges):
    return ConfigDict({"judges": judges, "clip": clip})


@pytest.fixture(name="avatar", scope="module")
def _avatar():
    return load_condition_encoder("avatar")


@pytest.fixture(name="onnx", scope="module")
def _onnx(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    return [str(user_world.write_onnx(root / f"{seed}.onnx", seed)) for seed in (0, 1)]


def test_without_a_judge_the_condition_encoder_judges_and_is_not_called_independent(avatar):
    found = choose_judges(section(independent=""), avatar, 16, real=True)
    assert found.main == "own" and found.leaky == {"own"} and list(found.encoders) == ["own"]
    assert "no judge was given" in found.note and "not independent" in found.note
    assert "--config.evaluate.judges.independent=" in found.note
    nobody = choose_judges(section(), avatar, 16, real=False)
    assert not nobody.encoders and not nobody.note


def test_an_independent_judge_comes_first(avatar, onnx):
    found = choose_judges(section(same="avatar", other=onnx[0]), avatar, 16, real=True)
    assert found.main == "other" and found.leaky == {"same"}
    assert set(found.encoders) == {"same", "other"}  # no column says the same twice
    assert "judge same is the encoder that conditions" in found.note
    assert "optimistic" not in found.note
    alone = choose_judges(section(other=onnx[0]), avatar, 16, real=True)
    assert alone.main == "other" and alone.leaky == {"own"} and not alone.note


def test_the_condition_encoder_is_known_under_any_name(avatar, onnx, tmp_path):
    found = choose_judges(section(independent="avatar"), avatar, 16, real=True)
    assert found.main == "independent" and found.leaky == {"independent"}
    assert "judge independent is the encoder" in found.note and "optimistic" in found.note
    # A copy in another precision has another hash.
    save_encoder(tmp_path, avatar.module, avatar.params, "copy", dtype="float32")
    copy = load_condition_encoder(tmp_path)
    assert copy.hash != avatar.hash and same_encoder(copy, avatar, 16)
    changed = dataclasses.replace(
        copy, params={**copy.params, **_turned(copy.params)}, hash="other"
    )
    assert not same_encoder(changed, avatar, 16)
    one, other = map(load_condition_encoder, onnx)
    assert same_encoder(one, one, 16) and not same_encoder(one, other, 16)
    assert not same_encoder(one, avatar, 16)


def _turned(params):
    """The first layer of parameters with another sign."""
    import jax

    name = sorted(params)[0]
    return {name: jax.tree.map(lambda leaf: -np.asarray(leaf), params[name])}
