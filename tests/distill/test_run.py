"""`hyperlora distill` from folders of pictures of several shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.cli.config import load_config
from hyperlora_jax.distill import distillation
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures
from hyperlora_jax.targets.lora_targets import open_lora_targets

AVATARS = str(Path(__file__).parents[2] / "configs" / "avatars.py")
SHAPES = {"even": (32, 32), "tall": (40, 24), "tall too": (41, 22)}


pytestmark = pytest.mark.usefixtures("small_base")


@pytest.fixture(name="concepts", scope="module")
def _concepts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts")
    noise = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        (folder / name).mkdir()
        for view, suffix in enumerate(("png", "jpg", "webp")[: 2 + (name == "even")]):
            pixels = noise.integers(0, 255, (*shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{view}.{suffix}")
    rows = [
        {"file_name": "0.png", "role": "reference", "identity": "Tilda"},
        {"file_name": "1.jpg", "role": "target", "text": "blonde hair", "identity": "Tilda"},
    ]
    (folder / "tall" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(concepts, count, *more):
    settings = (
        f"data.source={concepts}", f"distill.num_concepts={count}", "distill.num_slots=1",
        "distill.num_steps=2", "distill.steps_per_call=2", "distill.rank=1",
        "distill.preset=w2w", "distill.encoders=('avatar',)", *more,
    )  # fmt: skip
    return load_config(AVATARS, [f"--config.{setting}" for setting in settings])


def test_one_program_per_shape_and_loras_that_do_not_depend_on_the_others(concepts, tmp_path):
    programs = slot_state.advance._cache_size()
    path = distillation.distill(
        config(concepts, 3, "distill.buckets=True"), tmp_path / "buckets"
    ).path
    assert slot_state.advance._cache_size() == programs + 2, "expected one program per shape"
    targets = open_lora_targets(path)
    found = {targets.ids[k]: targets[k] for k in range(3)}
    for name, shape in {"even": (16, 16), "tall": (20, 12)}.items():
        for png in (*found[name].targets, *found[name].references):
            assert pictures.decode(png).shape == (*shape, 3)
    assert [len(found[name].targets) for name in SHAPES] == [3, 1, 2], "each its own pictures"
    assert found["tall"].references != found["tall"].targets, "roles are kept"
    assert (found["tall"].captions, found["tall"].identity) == (("blonde hair",), "Tilda")
    assert targets.facts["pictures"]["concepts_by_size"] == {"12x20": 2, "16x16": 1}
    encoder = load_condition_encoder("avatar")
    assert targets.facts["encoders"] == {encoder.name: encoder.hash}
    shown = np.stack([pictures.decode(png, 16) for png in found["even"].references])
    expected, _ = encoder.encode(shown.astype(np.float32) / 255.0)
    np.testing.assert_allclose(found["even"].embeddings[encoder.name], expected, atol=1e-4)
    alone = open_lora_targets(distillation.distill(config(concepts, 1), tmp_path / "square").path)
    assert slot_state.advance._cache_size() == programs + 2, "the square program serves again"
    assert alone.ids == ["even"] and np.abs(alone[0].lora).max() > 0
    np.testing.assert_allclose(found["even"].lora, alone[0].lora, atol=1e-6)
    assert not list((tmp_path / "buckets").glob("slots*")), "unfinished slots are cleared away"


def test_wrong_settings_are_named(concepts, tmp_path):
    for setting, match in (
        ("distill.splits=half", "distill.splits: got 'half', expected 'train' or 'hash'"),
        ("distill.num_concepts=9", "has 3 concepts, expected 9"),
        ("distill.encoders=('gone',)", "encoder gone: no such file or folder"),
        ("distill.encoders=('avatar', 'avatar')", "expected different names"),
        ("data.source=avatars2", "avatars2: does not exist, expected a folder of concepts"),
    ):
        with pytest.raises(UserError, match=match):
            distillation.distill(config(concepts, 3, setting), tmp_path / "out")
    given = config(concepts, 3)
    with given.unlocked():
        given.distill.recipe.prior_weight = 1.0
    with pytest.raises(UserError, match="has a prior_weight, but there is no"):
        distillation.distill(given, tmp_path / "out")
