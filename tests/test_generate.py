"""References in, LoRA files out: one subject, and folders of them in one batch."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.cli.main import main
from hyperlora_jax.encoders import condition_encoders
from hyperlora_jax.encoders.image_encoder import ConvEncoder, init_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.generate import generate_many, generate_one, reference_hash
from hyperlora_jax.hypernet import editing, familiarity
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora, read_metadata

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
SPEC = LoraSpec((LoraSite(BLOCK + "attn1.to_q", 8, 8, 2), LoraSite(BLOCK + "attn2.to_k", 6, 8, 2)))


@pytest.fixture(name="hyper", scope="module")
def _hyper():
    return hypernetwork("ridge")


def hypernetwork(kind):
    """A generator that is fitted in no time and answers every embedding with another LoRA."""
    module = ConvEncoder(image_size=8, widths=(8, 8), embedding_dim=8, pool_channels=4)
    params = init_encoder(module, jax.random.key(3))
    encoder = condition_encoders.FlaxImageEncoder(
        "e", module, params, condition_encoders.tree_hash(params)
    )
    model = {"generator": kind, "baseline": {"num_components": 3} if kind != "ridge" else {}}
    generator, random = build_generator(SPEC, model), np.random.default_rng(0)
    vectors = random.normal(size=(20, SPEC.num_parameters)).astype(np.float32)
    constants = generator.fit(random.normal(size=(20, 8)).astype(np.float32), vectors)
    facts = {"base_hash": "b" * 64, "base": "x", "family": "sd1"}
    return Hypernetwork(generator, {}, encoder, facts, model, constants)


@pytest.fixture(name="subjects")
def _subjects(tmp_path):
    random = np.random.default_rng(0)
    for name in ("anna", "ben", "cem"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(2):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{i}.png")
    return tmp_path / "in"


def test_every_subject_of_a_batch_gets_its_own_file(hyper, subjects, tmp_path):
    options = {"strength": 0.5, "seed": 3, "dtype": "float32"}
    many = generate_many(hyper, subjects, tmp_path / "out", **options)
    assert [file.path.name for file in many] == [f"{n}.safetensors" for n in ("anna", "ben", "cem")]
    read = {file.path.stem: load_lora(file.path) for file in many}
    for name, (lora, spec) in read.items():
        assert spec == SPEC
        pictures = sorted((subjects / name).iterdir())
        texts = read_metadata(tmp_path / "out" / f"{name}.safetensors")
        assert texts["hyperlora.reference_hash"] == reference_hash(pictures)
        assert texts["hyperlora.base_hash"] == "b" * 64
        assert (texts["hyperlora.strength"], texts["hyperlora.seed"]) == ("0.5", "3")
        (alone,) = generate_one(hyper, pictures, tmp_path / f"{name}.safetensors", **options)
        for ours, theirs in zip(
            jax.tree.leaves(lora), jax.tree.leaves(load_lora(alone.path)[0]), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        full = generate_one(hyper, pictures, tmp_path / "full", strength=1.0, dtype="float32")
        for half, whole in zip(_deltas(lora), _deltas(load_lora(full[0].path)[0]), strict=True):
            np.testing.assert_allclose(2 * half, whole, atol=1e-5)
    first, second = _deltas(read["anna"][0]), _deltas(read["ben"][0])
    assert any(np.abs(a - b).max() > 1e-6 for a, b in zip(first, second, strict=True))


def _deltas(lora):
    return jax.tree.leaves(jax.tree.map(factors.delta, lora, is_leaf=factors.is_site))


def test_what_cannot_be_written_is_one_line(hyper, subjects, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write here"):
        generate_many(hyper, subjects, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_edits_are_added_exactly_and_told_in_the_header(hyper, subjects, tmp_path):
    random = np.random.default_rng(1)
    vectors = random.normal(size=(20, SPEC.num_parameters)).astype(np.float32)
    shown = {"hat": random.uniform(size=20) < 0.5, "tie": random.uniform(size=20) < 0.5}
    directions = editing.fit_directions(vectors, SPEC, shown)
    file, workdir = tmp_path / "d.safetensors", tmp_path / "hyper"
    editing.save_directions(file, directions)
    hyper.save(workdir)
    command = ["generate", "--checkpoint", workdir, "--reference", subjects / "anna" / "0.png"]
    command += ["--dtype", "float32", "--strength", "1.5"]

    def generate(name, *more):
        path = tmp_path / f"{name}.safetensors"
        assert main([*map(str, (*command, "--out", path, *more))]) == 0
        return *load_lora(path), read_metadata(path)

    plain, spec, texts = generate("plain")
    assert spec.max_rank == 2 and "hyperlora.edits" not in texts
    edits = ("--directions", file, "--edit", "hat=1.5", "tie=-2")
    edited, spec, texts = generate("edited", *edits)
    assert spec.max_rank == 6 and json.loads(texts["hyperlora.edits"]) == {"hat": 1.5, "tie": -2.0}
    wanted, _ = editing.edit(plain, directions, {"hat": 1.5, "tie": -2.0})
    for ours, theirs in zip(_deltas(edited), _deltas(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert main([*map(str, (*command, "--out", tmp_path / "x", *edits[:3], "hat"))]) == 2


def write_subjects(root, counts, size=20):
    for number, (name, count) in enumerate(counts.items()):
        random = np.random.default_rng(number)
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = random.integers(0, 256, (size + k, size, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


@pytest.mark.parametrize("kind", ["ridge", "pca_gaussian"])
def test_a_subject_uses_all_its_references_and_no_other_subject(kind, tmp_path):
    hyper, samples = hypernetwork(kind), 2 if kind == "pca_gaussian" else 1
    options = {"seed": 3, "dtype": "float32", "num_samples": samples}
    people = write_subjects(tmp_path / "in", {"anna": 2, "bert": 1, "carl": 5, "dora": 2})
    row = {"file_name": "3.png", "role": "target"}  # no reference of his
    (people / "carl" / "metadata.jsonl").write_text(json.dumps(row))
    many = generate_many(hyper, people, tmp_path / "out", **options)
    assert [file.subject for file in many] == sorted(["anna", "bert", "carl", "dora"] * samples)
    used = {"anna": [0, 1], "bert": [0], "carl": [0, 1, 2, 4], "dora": [0, 1]}
    for name, numbers in used.items():
        paths = [people / name / f"{k}.png" for k in numbers]
        alone = generate_one(hyper, paths, tmp_path / f"{name}.safetensors", **options)
        own = [file for file in many if file.subject == name]
        for one, batched in zip(alone, own, strict=True):
            texts = read_metadata(batched.path)
            assert texts["hyperlora.reference_hash"] == reference_hash(paths)
            pairs = zip(_loaded(one), _loaded(batched), strict=True)
            assert all(np.abs(a - b).max() < 1e-5 for a, b in pairs)
    if samples > 1:
        first, second = (_loaded(file) for file in many[:2])
        assert max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)) > 1e-3


def _loaded(file):
    return _deltas(load_lora(file.path)[0])


def test_the_command_says_strength_and_familiarity(hyper, tmp_path, capsys):
    people = write_subjects(tmp_path / "in", {"anna": 1, "bert": 2})
    folders = [[people / name / "0.png"] for name in ("anna", "bert")]
    pooled, _ = hyper.embed(folders)
    rows = np.repeat(np.asarray(pooled[0]), 3, axis=0)
    known = familiarity.fit(rows, rows)
    constants = {**hyper.constants, "familiarity": {**known, "typical": np.float32([0.99, 1, 2])}}
    knowing = dataclasses.replace(hyper, constants=constants).with_facts(default_strength=1.5)
    knowing.save(tmp_path / "run")
    command = ["generate", "--checkpoint", str(tmp_path / "run")]
    assert main([*command, "--subjects", str(people), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"wrote 2 files to {tmp_path / 'out'} (strength 1.5, familiarity 0.00 to")
    assert err.startswith("warning: bert: unlike anything this checkpoint was trained on")
    assert err.count("\n") == 1
    own = [*command, "--reference", str(people / "anna" / "0.png"), "--out", str(tmp_path / "anna")]
    assert main([*own, "--strength", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"wrote {tmp_path / 'anna.safetensors'} (strength 0.5, familiarity 0.")
    assert err == ""
    half, whole = load_lora(tmp_path / "anna.safetensors")[0], tmp_path / "out/anna.safetensors"
    for a, b in zip(_deltas(half), _deltas(load_lora(whole)[0]), strict=True):
        np.testing.assert_allclose(3 * a, b, rtol=1e-2, atol=1e-3)
    assert main([*own[:-1], str(people)]) == 2
    assert "is a folder, expected a file" in capsys.readouterr().err
