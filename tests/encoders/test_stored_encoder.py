"""A checkpoint finds the encoder that it was trained with, and no other."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hyperlora_jax.cli.main import main
from hyperlora_jax.encoders import condition_encoders, stored_encoder
from hyperlora_jax.encoders.image_encoder import ConvEncoder, init_encoder
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import read_metadata
from tests import user_world

IMAGES = np.random.default_rng(0).random((2, 20, 30, 3)).astype(np.float32)
SIZES = {"ours": (16, 16), "clip": (24, 24), "vit": (20, 20), "encoder.onnx": (28, 28)}
BY_PATH = ("vit", "encoder.onnx")


def write_ours(folder, seed=0):
    module = ConvEncoder(image_size=16, widths=(8, 16), embedding_dim=12, pool_channels=4, groups=4)
    condition_encoders.save_encoder(
        folder, module, init_encoder(module, jax.random.key(seed)), "ours"
    )


WRITERS = {
    "ours": write_ours,
    "clip": user_world.write_clip,
    "vit": user_world.write_vit,
    "encoder.onnx": user_world.write_onnx,
}


@pytest.fixture(scope="module", name="originals")
def _originals(tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    root = tmp_path_factory.mktemp("originals")
    for name, write in WRITERS.items():
        write(root / name)
    user_world.write_people(root / "people", {"anna": (2, (40, 40)), "bert": (2, (30, 50))})
    return root


@pytest.fixture(name="site", params=WRITERS)
def _site(request, originals, tmp_path):
    """(folder with an encoder and a checkpoint below run/, the encoder's name)."""
    folder = tmp_path / "site"
    shutil.copytree(originals, folder)
    save_checkpoint(folder, request.param)
    return folder, request.param


def save_checkpoint(folder, name, **options):
    """A closed form, which needs no training: the mean of some LoRAs."""
    spec = LoraSpec(
        (LoraSite("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 8, 8, 2, "linear"),)
    )
    model = {"generator": "mean"}
    generator = build_generator(spec, model)
    vectors = np.random.default_rng(1).normal(size=(3, spec.num_parameters)).astype(np.float32)
    constants = generator.fit(np.zeros((3, 4)), vectors)
    facts = {"base": "b", "base_hash": "b", "family": "sd1"}
    encoder = load_condition_encoder(folder / name, **options)
    hyper = Hypernetwork(generator, {}, encoder, facts, model, constants)
    hyper.save(folder / "run" / "hypernetwork")
    return hyper


def generate(folder, *more):
    """Exit code of the command for one subject of two references with different shapes."""
    pictures = [folder / "people" / "anna" / "0.png", folder / "people" / "bert" / "1.jpg"]
    arguments = ["--checkpoint", folder / "run", "--out", folder / "a.safetensors", "--reference"]
    return main(["generate", *map(str, [*arguments, *pictures, *more])])


def move(folder, name):
    (folder / "elsewhere").mkdir()
    return (folder / name).rename(folder / "elsewhere" / name)


def test_restored_sees_the_same(site):
    folder, name = site
    first = load_condition_encoder(folder / name)
    found = Hypernetwork.restore(folder / "run").encoder
    assert (found.name, found.hash) == (first.name, first.hash)
    assert found.image_size == first.image_size == SIZES[name]
    for ours, theirs in zip(found.encode(IMAGES), first.encode(IMAGES), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_commands_run_and_say_the_encoder(site, capsys):
    folder, name = site
    assert generate(folder) == 0
    header = read_metadata(folder / "a.safetensors")
    encoder = load_condition_encoder(folder / name)
    assert header["hyperlora.encoder_hash"] == encoder.hash
    assert json.loads(header["hyperlora.encoder"])["name"] == encoder.name
    many = ["--subjects", str(folder / "people"), "--out", str(folder / "many")]
    assert main(["generate", "--checkpoint", str(folder / "run"), *many]) == 0
    capsys.readouterr()
    assert main(["inspect", str(folder / "run" / "hypernetwork")]) == 0
    out = capsys.readouterr().out
    height, width = SIZES[name]
    assert f"sees {height}x{width} pixels" in out and encoder.hash[:12] in out
    assert (str(folder / name) if name in BY_PATH else "kept with the checkpoint") in out
    own = ["--encoder", str(folder / name)]
    assert main(["inspect", str(folder / "run" / "hypernetwork"), *own]) == 0


@pytest.mark.parametrize("name", ["ours", "clip"])
def test_what_is_copied_needs_no_original(originals, tmp_path, name):
    folder = shutil.copytree(originals, tmp_path / "site")
    save_checkpoint(folder, name)
    expected = load_condition_encoder(folder / name).encode(IMAGES)[0]
    shutil.rmtree(folder / name)
    found = Hypernetwork.restore(folder / "run").encoder
    np.testing.assert_array_equal(found.encode(IMAGES)[0], expected)
    assert generate(folder) == 0


@pytest.mark.parametrize("name", BY_PATH)
def test_moved_encoder(originals, tmp_path, name, capsys):
    folder = shutil.copytree(originals, tmp_path / "site")
    save_checkpoint(folder, name)
    moved = move(folder, name)
    capsys.readouterr()
    assert generate(folder) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(folder / name) in error and "--encoder PATH" in error
    assert main(["inspect", str(folder / "run" / "hypernetwork")]) == 0
    assert f"not at hand: checkpoint {folder}" in capsys.readouterr().out
    assert generate(folder, "--encoder", moved) == 0
    assert Hypernetwork.restore(folder / "run", encoder=moved).encoder.source == str(moved)
    encoder = load_condition_encoder(moved)
    assert Hypernetwork.restore(folder / "run", encoder=encoder).encoder.hash == encoder.hash
    assert generate(folder, "--encoder", folder / "nothing") == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", BY_PATH)
def test_moved_together(originals, tmp_path, name):
    """Encoder and workdir keep their places relative to each other, or the workdir holds it."""
    folder = shutil.copytree(originals, tmp_path / "site")
    save_checkpoint(folder, name)
    there = folder.rename(tmp_path / "there")
    assert generate(there) == 0
    (there / name).rename(there / "run" / name)
    assert generate(there) == 0


@pytest.mark.parametrize("name", WRITERS)
def test_changed_encoder(originals, tmp_path, name, capsys):
    folder = shutil.copytree(originals, tmp_path / "site")
    before = save_checkpoint(folder, name).encoder.hash
    other = folder / "run" / "hypernetwork" / "encoder" if name not in BY_PATH else folder / name
    shutil.rmtree(other, ignore_errors=True)
    WRITERS[name](other, seed=5)
    capsys.readouterr()
    assert generate(folder) == 2
    error = capsys.readouterr().err
    after = load_condition_encoder(other).hash
    assert before[:12] in error and after[:12] in error and str(other) in error
    assert error.count("\n") == 1
    assert main(["inspect", str(folder / "run" / "hypernetwork")]) == 0
    assert after[:12] in capsys.readouterr().out
    wrong = folder / ("clip" if name != "clip" else "vit")
    assert generate(folder, "--encoder", wrong) == 2
    error = capsys.readouterr().err
    assert before[:12] in error and load_condition_encoder(wrong).hash[:12] in error


def test_options_are_kept(originals, tmp_path):
    folder = shutil.copytree(originals, tmp_path / "site")
    for name, options in (
        ("encoder.onnx", {"mean": 0.4, "std": (0.2, 0.3, 0.4)}),
        ("vit", {"mean": (0.1, 0.2, 0.3)}),
        ("clip", {"std": 0.25}),
    ):
        hyper = save_checkpoint(folder, name, **options)
        assert hyper.encoder.hash != load_condition_encoder(folder / name).hash
        for given in (None, folder / name):
            found = Hypernetwork.restore(folder / "run", given).encoder
            assert found.preprocessing == hyper.encoder.preprocessing
            np.testing.assert_array_equal(found.encode(IMAGES)[0], hyper.encoder.encode(IMAGES)[0])


def test_saved_again_where_it_was_read(originals, tmp_path):
    """As `hyperlora evaluate` does to keep a default: the encoder's files stay as they are."""
    folder = shutil.copytree(originals, tmp_path / "site")
    save_checkpoint(folder, "clip")
    weights = folder / "run" / "hypernetwork" / "encoder" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    Hypernetwork.restore(folder / "run").save(folder / "run" / "hypernetwork")
    assert weights.stat().st_mtime_ns == before
    Hypernetwork.restore(folder / "run").save(folder / "again")
    assert Hypernetwork.restore(folder / "again").encoder.name == "clip"


def test_older_records(originals, tmp_path):
    """Checkpoints used to say no more than name and hash."""
    folder = shutil.copytree(originals, tmp_path / "site")
    config = folder / "run" / "hypernetwork" / "config.json"
    for name in ("ours", "encoder.onnx"):
        save_checkpoint(folder, name)
        content = json.loads(config.read_text())
        content["encoder"] = {key: content["encoder"][key] for key in ("name", "hash")}
        config.write_text(json.dumps(content))
        if name == "ours":
            assert Hypernetwork.restore(folder / "run").encoder.name == "ours"
            shutil.rmtree(folder / "run" / "hypernetwork" / "encoder")
    with pytest.raises(UserError, match=r"with the encoder encoder \(.*; name it by --encoder"):
        Hypernetwork.restore(folder / "run")
    assert Hypernetwork.restore(folder / "run", folder / "encoder.onnx").encoder.name == "encoder"


def test_an_object_of_ones_own(originals, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Colour:
        name: str = "colour"
        hash: str = "c" * 64
        embedding_dim: int = 3
        num_tokens: int = 1
        image_size: tuple[int, int] = (8, 8)

        def encode(self, images):
            pooled = np.asarray(images).mean(axis=(1, 2))
            return pooled, pooled[:, None]

    folder = shutil.copytree(originals, tmp_path / "site")
    hyper = dataclasses.replace(save_checkpoint(folder, "ours"), encoder=Colour())
    hyper.save(folder / "own")
    with pytest.raises(UserError, match=r"colour \(python, cccccccccccc\), which has no path"):
        Hypernetwork.restore(folder / "own")
    assert Hypernetwork.restore(folder / "own", Colour()).encoder.name == "colour"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_half(originals, tmp_path, dtype):
    import jax.numpy as jnp

    folder = shutil.copytree(originals, tmp_path / "site")
    weights = folder / "clip" / "model.safetensors"
    half = {name: value.astype(jnp.dtype(dtype)) for name, value in load_file(weights).items()}
    save_file(half, weights, {"format": "pt"})
    hyper = save_checkpoint(folder, "clip")
    copy = folder / "run" / "hypernetwork" / "encoder"
    assert {str(v.dtype) for v in load_file(copy / "model.safetensors").values()} == {dtype}
    assert load_condition_encoder(copy).hash == hyper.encoder.hash


def test_a_copy_of_clip_is_read_by_transformers(originals, tmp_path):
    import torch
    import transformers

    folder = shutil.copytree(originals, tmp_path / "site")
    save_checkpoint(folder, "clip", mean=0.4, std=0.2)
    copy = folder / "run" / "hypernetwork" / stored_encoder.FOLDER
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(copy).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(copy)
    picture = np.uint8(IMAGES[0, :20, :20] * 255)
    picture = np.kron(picture, np.ones((6, 6, 1), np.uint8))  # 120 pixels: 5 for each of 24
    whole = picture.reshape(24, 5, 24, 5, 3).mean(axis=(1, 3)).astype(np.float32) / 255
    pixels = processor(
        [np.uint8(whole * 255)], do_center_crop=False, return_tensors="pt"
    )["pixel_values"]  # fmt: skip
    with torch.no_grad():
        theirs = model(pixels).image_embeds.numpy()
    ours = load_condition_encoder(copy).encode((np.uint8(whole * 255) / np.float32(255))[None])[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
