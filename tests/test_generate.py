"""References in, LoRA files out: one subject, and folders of them in one batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.generate import generate_many, generate_one, reference_hash
from hyperlora_jax.hypernet import conditioning, editing
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.hypernet.image_encoder import ConvEncoder, init_encoder
from hyperlora_jax.hypernet.model import Hypernetwork
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora, read_metadata

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
SPEC = LoraSpec((LoraSite(BLOCK + "attn1.to_q", 8, 8, 2), LoraSite(BLOCK + "attn2.to_k", 6, 8, 2)))


@pytest.fixture(name="hyper", scope="module")
def _hyper():
    module = ConvEncoder(image_size=8, widths=(8, 8), embedding_dim=8, pool_channels=4)
    params = init_encoder(module, jax.random.key(3))
    encoder = conditioning.FlaxImageEncoder("e", module, params, conditioning.tree_hash(params))
    model = {"generator": "regression", "network": {"width": 16, "depth": 1, "num_heads": 2}}
    generator = build_generator(SPEC, model)
    weights = generator.init(jax.random.key(4), Condition(*encoder.encode(jnp.zeros((1, 8, 8, 3)))))
    weights = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), weights
    )
    facts = {"base_hash": "b" * 64, "base": "x", "family": "sd1"}
    return Hypernetwork(generator, weights, encoder, facts, model)


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
    assert [path.name for path in many] == [f"{n}.safetensors" for n in ("anna", "ben", "cem")]
    read = {path.stem: load_lora(path) for path in many}
    for name, (lora, spec) in read.items():
        assert spec == SPEC
        pictures = sorted((subjects / name).iterdir())
        texts = read_metadata(tmp_path / "out" / f"{name}.safetensors")
        assert texts["hyperlora.reference_hash"] == reference_hash(pictures)
        assert texts["hyperlora.base_hash"] == "b" * 64
        assert (texts["hyperlora.strength"], texts["hyperlora.seed"]) == ("0.5", "3")
        (alone,) = generate_one(hyper, pictures, tmp_path / f"{name}.safetensors", **options)
        for ours, theirs in zip(
            jax.tree.leaves(lora), jax.tree.leaves(load_lora(alone)[0]), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        full = generate_one(hyper, pictures, tmp_path / "full", strength=1.0, dtype="float32")
        for half, whole in zip(_deltas(lora), _deltas(load_lora(full[0])[0]), strict=True):
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
