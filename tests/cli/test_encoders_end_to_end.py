"""The whole path with every kind of condition encoder, as a user types it: train, generate (one
picture, two of different shapes, many subjects), inspect, export, generate from that, refine."""

import json
import shutil
from pathlib import Path

import pytest

from hyperlora_jax.cli.main import main
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora_files import read_metadata
from tests import user_world

pytestmark = pytest.mark.slow
AVATARS = str(Path(__file__).parents[2] / "configs" / "avatars.py")
ENCODERS = ("avatar", "clip", "vit", "encoder.onnx")
OPTIONS = {"encoder.onnx": ["--config.model.encoder_options.mean=(0.4,0.5,0.6)"]}


def run(*arguments):
    return main([str(argument) for argument in arguments])


def train(root, encoder, *more):
    return run(
        *("train", "--config", AVATARS, "--workdir", root / "run"),
        *(f"--config.base={root / 'base'}", f"--config.data.source={root / 'people'}"),
        "--config.data.num_identities=4",
        f"--config.model.encoder={encoder if encoder == 'avatar' else root / encoder}",
        *("--config.train.num_steps=3", "--config.train.batch_size=2"),
        *("--config.train.images_per_subject=1", "--config.train.num_references=(1,2)"),
        *user_world.SHRUNK,
        *OPTIONS.get(encoder, []),
        *more,
    )


@pytest.fixture(scope="module", name="world")
def _world(tmp_path_factory):
    pytest.importorskip("diffusers")
    pytest.importorskip("onnxruntime")
    return user_world.write_all(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", name="trained", params=ENCODERS)
def _trained(request, world, tmp_path_factory):
    """(folder with encoders, pictures, base and a trained run, the encoder's name)."""
    root = tmp_path_factory.mktemp(request.param) / "site"
    shutil.copytree(world, root)
    assert train(root, request.param) == 0
    return root, request.param


@pytest.fixture(name="site")
def _site(trained, tmp_path):
    """The same in a place of its own, so that the original's paths lead nowhere; (folder, name)."""
    root, name = trained
    return Path(shutil.copytree(root, tmp_path / "site")), name


def generate(root, checkpoint, out, *more):
    pictures = [root / "people" / "anna" / "0.png", root / "people" / "bert" / "1.jpg"]
    chosen = more or ("--reference", *pictures)
    return run("generate", "--checkpoint", checkpoint, "--out", out, *chosen)


def test_every_command(trained, tmp_path, capsys):
    root, name = trained
    one = ("--reference", root / "people" / "anna" / "0.png")
    assert generate(root, root / "run", tmp_path / "one.safetensors", *one) == 0
    assert generate(root, root / "run", tmp_path / "two.safetensors") == 0
    assert generate(root, root / "run", tmp_path / "many", "--subjects", root / "people") == 0
    files = sorted(file.stem for file in (tmp_path / "many").iterdir())
    assert files == sorted(user_world.PEOPLE)
    capsys.readouterr()
    assert run("inspect", root / "run" / "hypernetwork") == 0
    told = capsys.readouterr().out
    encoder = Hypernetwork.restore(root / "run").encoder
    height, width = encoder.image_size
    assert f"sees {height}x{width} pixels" in told and encoder.hash[:12] in told
    assert run("export", root / "run", "--out", tmp_path / "out") == 0
    assert generate(root, tmp_path / "out", tmp_path / "again.safetensors") == 0
    same = (tmp_path / "again.safetensors").read_bytes()
    assert same == (tmp_path / "two.safetensors").read_bytes()
    header = read_metadata(tmp_path / "two.safetensors")
    assert header["hyperlora.encoder_hash"] == encoder.hash
    refine = ("refine", tmp_path / "two.safetensors", "--images", root / "people" / "bert")
    refine = (*refine, "--num_steps", 1, "--out", tmp_path / "refined.safetensors", "--encoder")
    source = name if name == "avatar" else root / name
    assert run(*refine, source) == 0
    kept = read_metadata(tmp_path / "refined.safetensors")
    assert kept["hyperlora.encoder_hash"] == encoder.hash
    assert json.loads(kept["hyperlora.encoder"])["name"] == encoder.name
    capsys.readouterr()
    other = root / ("clip" if name != "clip" else "vit")
    assert run(*refine, other) == 2
    error = capsys.readouterr().err
    assert encoder.hash[:12] in error and load_condition_encoder(other).hash[:12] in error


def test_the_copied_workdir_works_alone(site, trained, tmp_path):
    """ours and CLIP without the original encoder, the others with it beside the workdir."""
    folder, name = site
    original = trained[0].rename(trained[0].with_name("gone"))
    try:
        if name in ("clip", "avatar"):
            shutil.rmtree(folder / "clip")
        assert generate(folder, folder / "run", tmp_path / "a.safetensors") == 0
        assert run("export", folder / "run", "--out", tmp_path / "out") == 0
        assert generate(folder, tmp_path / "out", tmp_path / "b.safetensors") == 0
    finally:
        original.rename(trained[0])


@pytest.mark.parametrize("name", ["vit", "encoder.onnx"])
def test_moved_and_changed(world, tmp_path, capsys, name):
    """Before the training has ended, too: `export` of an earlier checkpoint."""
    root = Path(shutil.copytree(world, tmp_path / "site"))
    assert train(root, name) == 0
    shutil.rmtree(root / "run" / "hypernetwork")
    (root / name).rename(root / "moved")
    moved = (root / "moved").rename(root / f"moved{Path(name).suffix}")
    capsys.readouterr()
    assert run("export", root / "run", "--out", root / "out") == 2
    assert f"encoder {root / name}: no such file or folder" in capsys.readouterr().err
    assert run("export", root / "run", "--out", root / "out", "--encoder", moved) == 0
    assert generate(root, root / "out", tmp_path / "a.safetensors") == 0
    write = {"vit": user_world.write_vit, "encoder.onnx": user_world.write_onnx}[name]
    write(root / name, seed=7)
    capsys.readouterr()
    assert run("export", root / "run", "--out", root / "out") == 2
    error = capsys.readouterr().err
    assert "expects the encoder" in error and str(root / name) in error
    # A run goes on with the encoder that it was begun with, and with no other.
    assert train(root, name, "--config.train.num_steps=4") == 2
    assert "encoder" in capsys.readouterr().err
