"""Whatever people have for pictures is one and the same to an encoder, or refused in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.encoders import condition_encoders
from hyperlora_jax.encoders.image_encoder import ConvEncoder, init_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora, read_metadata
from hyperlora_jax.pictures.pictures import load_image
from hyperlora_jax.pictures.references import by_number, read_references

SPEC = LoraSpec(
    (
        LoraSite("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 8, 8, 2),
        LoraSite("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 6, 8, 2),
    )
)
KEY = jax.random.key(0)


def encoder_of(size=8):
    module = ConvEncoder(image_size=size, widths=(8, 8), embedding_dim=8, pool_channels=4)
    params = init_encoder(module, jax.random.key(3))
    return condition_encoders.FlaxImageEncoder(
        "e", module, params, condition_encoders.tree_hash(params)
    )


def hypernetwork(encoder, kind="ridge", **facts):
    """A generator that is fitted in no time and answers every embedding with another LoRA."""
    model = {"generator": kind, "baseline": {"num_components": 3} if kind != "ridge" else {}}
    generator, random = build_generator(SPEC, model), np.random.default_rng(0)
    vectors = random.normal(size=(20, SPEC.num_parameters)).astype(np.float32)
    constants = generator.fit(random.normal(size=(20, 8)).astype(np.float32), vectors)
    facts = {"base_hash": "b" * 64, "base": "x", "family": "sd1", **facts}
    return Hypernetwork(generator, {}, encoder, facts, model, constants)


@pytest.fixture(name="hyper", scope="module")
def _hyper():
    return hypernetwork(encoder_of())


@pytest.fixture(name="files", scope="module")
def _files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for k, (height, width) in enumerate(((8, 8), (16, 24), (11, 9), (40, 32))):
        pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return sorted(folder.iterdir())


def same(ours, theirs, atol=1e-6):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_every_form_of_a_picture_gives_the_same_lora(hyper, files):
    for path in files:
        wanted = hyper.generate(KEY, path)
        assert factors.num_loras(wanted) == 1
        picture = Image.open(path)
        pixels = np.asarray(picture)
        clear = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)
        forms = [
            str(path), [path], [[path]], path.read_bytes(), picture, [[picture]],
            pixels, pixels[None], pixels[None, None], [pixels], [[pixels]], clear,
            np.float32(pixels) / 255, np.float64(pixels) / 255, jnp.float32(pixels) / 255,
            np.float32(clear) / 255, jnp.asarray(pixels),
        ]  # fmt: skip
        for number, given in enumerate(forms):
            same(hyper.generate(KEY, given), wanted)
            assert hyper.embed(given)[0].shape == (1, 1, 8), number


def test_transparent_arrays_are_put_on_white(hyper):
    clear = np.zeros((8, 8, 4), np.uint8)
    white = np.full((8, 8, 3), 255, np.uint8)
    same(hyper.generate(KEY, clear), hyper.generate(KEY, white))
    same(hyper.generate(KEY, np.float32(clear)), hyper.generate(KEY, white))


def test_subjects_keep_their_own_number_of_pictures_and_their_order(hyper, files):
    nested = [[files[0], files[1]], files[2], [files[3], files[0], files[2]], np.asarray([[1]])]
    nested[3] = np.stack([load_image(files[0]), load_image(files[3], 8)])
    loras = hyper.generate(KEY, nested)
    assert [len(own) for own in read_references(nested, hyper.encoder)] == [2, 1, 3, 2]
    assert [places for places, _ in by_number(nested, hyper.encoder)] == [[1], [0, 3], [2]]
    for k, own in enumerate(nested):
        same(factors.index(loras, slice(k, k + 1)), hyper.generate(KEY, [own]), atol=1e-5)
    assert hyper.familiarity(nested) is None
    with pytest.raises(UserError, match=r"subjects have \[1, 2, 3\] pictures, expected one number"):
        hyper.embed(nested)


def test_samples_of_subjects_with_different_numbers_stay_together(files):
    hyper = hypernetwork(encoder_of(), "pca_gaussian")
    mixed = hyper.generate(KEY, [[files[0], files[1]], files[2], files[0]], num_samples=2)
    singles = hyper.generate(KEY, [files[2], files[0]], num_samples=2)
    assert factors.num_loras(mixed) == 6
    same(factors.index(mixed, slice(2, 6)), singles)


@pytest.mark.parametrize(
    "given, found",
    [
        ([], r"references: holds no picture"),
        ([[]], r"references\[0\]: holds no picture"),
        (np.zeros((0, 8, 8, 3)), r"array of shape \[0, 8, 8, 3\]"),
        (np.zeros((2, 0, 8, 8, 3)), r"array of shape \[2, 0, 8, 8, 3\]"),
        (np.zeros((4, 3, 16, 16)), r"array of shape \[4, 3, 16, 16\]"),
        (np.zeros((16, 16)), r"array of shape \[16, 16\]"),
        (np.zeros((8, 8, 3), np.int64), "array of int64"),
        (np.zeros((8, 8, 3), bool), "array of bool"),
        (np.full((8, 8, 3), np.nan), "floats from nan to nan"),
        (np.linspace(-1, 1, 192).reshape(8, 8, 3), "floats from -1 to 1"),
        (255 * np.ones((8, 8, 3), np.float32), "floats from 255 to 255"),
        (jnp.full((8, 8, 3), jnp.inf), "floats from inf to inf"),
        (np.zeros((4, 4, 3), np.uint8), "has 4x4 pixels, expected at least 8x8"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 8))], r"references\[1\]: found an array of shape"),
        ([[np.zeros((1, 8, 8, 3))]], r"references\[0\]\[0\]: found an array of shape"),
        (None, "found NoneType, expected paths"),
        ([{"file": "a.png"}], r"references\[0\]: found dict, expected paths"),
        ("nowhere.png", "nowhere.png: no such picture file"),
        (b"no picture", "references: found 10 bytes that are no picture"),
    ],
)
def test_anything_else_is_one_line(hyper, given, found):
    for ask in (hyper.embed, lambda given: hyper.generate(KEY, given)):
        with pytest.raises(UserError, match=found) as error:
            ask(given)
        assert "\n" not in str(error.value)


def test_traced_pictures_are_taken_without_a_look_at_them(hyper):
    pictures = jax.random.uniform(jax.random.key(5), (2, 3, 8, 8, 3))
    wanted = hyper.generate(KEY, pictures)
    same(jax.jit(hyper.generate)(KEY, pictures), wanted, atol=1e-5)
    each = jax.vmap(lambda own: hyper.generate(KEY, own[None]))(pictures)
    same(jax.tree.map(lambda leaf: leaf[:, 0], each), wanted, atol=1e-5)
    listed = jax.jit(lambda a, b: hyper.generate(KEY, [a, b]))(pictures[0], pictures[1])
    same(listed, wanted, atol=1e-5)
    whole = jnp.uint8(pictures * 255)
    same(jax.jit(hyper.generate)(KEY, whole), hyper.generate(KEY, whole), atol=1e-5)
    with pytest.raises(UserError, match="traced pictures have the shapes"):
        jax.jit(lambda a: hyper.generate(KEY, [[a[0], a[0, 1:]]]))(pictures[0])
    with pytest.raises(UserError, match="found a traced array of shape"):
        jax.jit(lambda a: hyper.generate(KEY, a))(jnp.zeros((8, 8, 4)))


def test_the_default_strength_is_applied_once(hyper, files):
    strong = hyper.with_facts(default_strength=1.5)
    plain = hyper.generate(KEY, files)
    same(strong.generate(KEY, files), factors.scale(plain, 1.5))
    same(strong.generate(KEY, files, strength=1.0), plain)
    same(strong.generate(KEY, files, strength=0.5), factors.scale(plain, 0.5))
    same(strong.write(KEY, *strong.embed(files)), plain)


def test_a_lora_is_saved_with_where_it_comes_from(hyper, files, tmp_path):
    loras = hyper.generate(KEY, files[:2])
    with pytest.raises(UserError, match="found a batch of 2 LoRAs for the file"):
        hyper.save_lora(tmp_path / "a.safetensors", loras)
    path = hyper.save_lora(
        tmp_path / "a.safetensors", hyper.generate(KEY, files[0]), dtype="float32", trigger="sks"
    )
    lora, spec = load_lora(path)
    assert spec == hyper.spec
    for ours, theirs in zip(deltas(lora), deltas(factors.index(loras, 0)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    texts = read_metadata(path)
    assert texts["hyperlora.base_hash"] == "b" * 64 and texts["hyperlora.base"] == "x"
    assert texts["hyperlora.encoder_hash"] == hyper.encoder.hash
    assert texts["hyperlora.generator"] == "ridge" and texts["hyperlora.trigger"] == "sks"
    assert texts["modelspec.architecture"] == "stable-diffusion-v1/lora"


def deltas(lora):
    return jax.tree.leaves(jax.tree.map(factors.delta, lora, is_leaf=factors.is_site))


def test_reprs_are_short(hyper):
    assert repr(hyper).startswith("Hypernetwork(ridge of ")
    assert "base 'x'" in repr(hyper) and "2 sites, rank 2" in repr(hyper)
    assert len(repr(hyper)) < 300 and len(repr(hyper.spec)) < 80
