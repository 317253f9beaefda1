"""`hyperlora train` on folders of pictures: roles, and a number of pictures of everyone's own."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from hyperlora_jax.batches.row_files import RowFiles
from hyperlora_jax.cli.main import main
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.pictures import pictures
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.subjects.encoding_cache import encode_once
from hyperlora_jax.subjects.subject_pictures import load_pictures
from tests import user_world
from tests.pictures.test_references import hypernetwork

PEOPLE = {"anna": (4, (40, 40)), "bert": (1, (48, 64)), "carl": (3, (100, 70))}
ROLES = {"0.png": "reference", "1.jpg": "target", "2.png": "both", "3.jpg": "reference"}
REFERENCES = (("anna", ("0.png", "2.png", "3.jpg")), ("bert", ("0.png",)),
              ("carl", ("0.png", "1.jpg", "2.png")))  # fmt: skip
TARGETS = (2, 1, 3)


@pytest.fixture(name="world", scope="module")
def _world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    user_world.write_base(root / "base")
    user_world.write_clip(root / "clip")
    user_world.write_people(root / "people", PEOPLE)
    rows = [{"file_name": name, "role": role, "text": role} for name, role in ROLES.items()]
    lines = "\n".join(map(json.dumps, rows))
    (root / "people" / "anna" / "metadata.jsonl").write_text(lines)
    return root


def train(world, workdir, *settings):
    section = {
        "base": world / "base",
        "data.source": world / "people",
        "data.num_identities": 3,
        "model.encoder": world / "clip",
        "model.rank": 1,
        "train.num_steps": 2,
        "train.batch_size": 4,
        "train.num_references": "(1,3)",
    }
    given = [f"--config.{key}={value}" for key, value in section.items()]
    return main(
        ["train", "--config", "configs/avatars.py", "--workdir", str(workdir), *given,
         *user_world.SHRUNK, *settings]
    )  # fmt: skip


def table(workdir, kind, name):
    (folder,) = (workdir / "encoded").glob(f"{kind}-*")
    return RowFiles(sorted(folder.iterdir())).tables()[name]


def _encoders(root):
    root.mkdir()
    load = load_condition_encoder
    return {
        "ours": lambda: load("avatar"),
        "clip": lambda: load(user_world.write_clip(root / "clip")),
        "vit": lambda: load(user_world.write_vit(root / "vit")),
        "onnx": lambda: load(user_world.write_onnx(root / "encoder.onnx")),
    }


@pytest.mark.parametrize("kind", ["ours", "clip", "vit", "onnx"])
def test_training_and_generate_see_a_file_alike(tmp_path, kind):
    """Pictures above and below an encoder's size and the base's: the same embedding in both."""
    encoder, folder = _encoders(tmp_path / "world")[kind](), tmp_path / "people" / "anna"
    folder.mkdir(parents=True)
    for k, (height, width) in enumerate(((12, 9), (20, 20), (28, 40), (100, 67), (224, 448))):
        pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    config = ConfigDict({"source": str(folder.parent), "skip_damaged": False})
    shown = load_pictures(config, 1, 32)
    encoded = encode_once(
        tmp_path / "w", load_base("tiny-sd"), shown, encoder=encoder, latents=False, texts=False
    )
    trained = encoded.references.of(0)
    pooled, tokens = hypernetwork(encoder).embed([sorted(folder.iterdir())])
    np.testing.assert_allclose(trained["pooled"], pooled[0], atol=1e-5)
    np.testing.assert_allclose(trained["tokens"], tokens[0], atol=1e-5)


@pytest.mark.slow
def test_roles_and_numbers_of_pictures(world, tmp_path):
    assert train(world, tmp_path) == 0
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(row)["loss"]) for row in rows) and len(rows) >= 1
    pooled, latents = table(tmp_path, "conditions", "pooled"), table(tmp_path, "latents", "latents")
    assert len(latents) == sum(TARGETS)
    encoder = load_condition_encoder(world / "clip")
    seen = [
        pictures.load_image(world / "people" / name / file, encoder.image_size)
        for name, files in REFERENCES
        for file in files
    ]
    expected, _ = encoder.encode(np.stack(seen).astype(np.float32) / 255.0)
    np.testing.assert_allclose(pooled[:], expected, atol=1e-5)


def test_wrong_numbers_are_named_before_anything_is_encoded(world, tmp_path, capsys):
    for setting in ("train.num_references=(3,1)", "train.images_per_subject=0"):
        assert train(world, tmp_path, f"--config.{setting}") == 2
        assert f"--config.{setting.split('=')[0]}=" in capsys.readouterr().err
        assert not (tmp_path / "encoded").exists()
