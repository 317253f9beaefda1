"""Prompts, LoRAs, sizes and guidance of `StableDiffusion.sample` in every form."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora_files import load_lora, save_lora
from hyperlora_jax.stable_diffusion.embedded import base_path, load_base
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.networks.lora_argument import lora_tree, scaled
from hyperlora_jax.stable_diffusion.weights import loading

QUICK = {"num_steps": 1}


@pytest.fixture(name="sd", scope="module")
def _sd():
    return load_base("tiny-sd")


@pytest.fixture(name="files", scope="module")
def _files(sd, tmp_path_factory):
    """Two LoRAs of other ranks and sites."""
    root, paths = tmp_path_factory.mktemp("loras"), []
    for k, (preset, rank) in enumerate((("w2w", 1), ("attn-qkvo", 4))):
        spec, random = sd.lora_spec(preset, rank), np.random.default_rng(k)
        lora = jax.tree.map(
            lambda leaf, random=random: random.standard_normal(leaf.shape).astype(np.float32),
            factors.zeros(spec),
        )
        paths.append(save_lora(root / f"{k}.safetensors", lora, spec, family="sd1"))
    return paths


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_loras_in_every_form_are_one_tree(sd, files):
    read = [load_lora(path, sd) for path in files]
    both = factors.stack_padded([tree for tree, _ in read])
    assert lora_tree(None, sd) is None and lora_tree([], sd) is None
    for given in (files[0], str(files[0]), read[0], read[0][0]):
        same(lora_tree(given, sd), read[0][0])
    batch = jax.tree.map(lambda leaf: leaf[None], read[0][0])
    for given in (files, tuple(files), read, [batch, files[1]]):
        same(lora_tree(given, sd), both)
    for given in (3, [3], [[files[0]]], [None]):
        with pytest.raises(UserError, match=r"^lora: "):
            lora_tree(given, sd)
    same(scaled(both, [2.0, 2.0]), scaled(both, 2.0))
    same(scaled(read[0][0], [2.0]), scaled(read[0][0], 2.0))
    with pytest.raises(UserError, match=r"numbers of shape \[3\] for 2 LoRAs"):
        scaled(both, [1.0, 2.0, 3.0])


def test_one_prompt_is_one_picture_and_one_for_every_lora(sd, files):
    wanted = sd.sample(jax.random.key(3), ["a portrait"], **QUICK)
    found = sd.sample(3, "a portrait", **QUICK)
    assert found.shape == (1, 16, 16, 3)
    same(found, wanted)
    with_loras = sd.sample(3, "a portrait", lora=files, strength=[0.0, 1.0], **QUICK)
    plain = sd.sample(3, ["a portrait"] * 2, **QUICK)
    assert with_loras.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(with_loras[0], plain[0], atol=1e-5)
    assert np.abs(with_loras[1] - plain[1]).max() > 0.05


def test_height_and_width_in_pixels(sd):
    assert sd.noise(0, 2, height=32).shape == (2, 2 * sd.unet.settings.sample_size[0], *(
        sd.unet.settings.sample_size[1], sd.unet.settings.in_channels))  # fmt: skip
    assert sd.sample(0, "a", height=8, width=16, **QUICK).shape == (1, 8, 16, 3)
    for size in ({"height": 17}, {"width": 0}, {"height": -16}):
        name, number = next(iter(size.items()))
        with pytest.raises(UserError, match=f"{name} is {number}, expected a multiple of"):
            sd.sample(0, "a", **size)


def test_negative_prompts_need_guidance(sd):
    with pytest.raises(UserError, match="negative prompts do nothing at guidance 1"):
        sd.sample(0, "a", negative_prompts="b")
    texts = {"num_steps": 1, "guidance": 2.0}
    one = sd.sample(0, ["a", "b"], negative_prompts="hat", **texts)
    same(one, sd.sample(0, ["a", "b"], negative_prompts=["hat", "hat"], **texts))
    assert np.abs(one - sd.sample(0, ["a", "b"], **texts)).max() > 1e-3
    with pytest.raises(UserError, match="1 negative prompts for 2 prompts"):
        sd.sample(0, ["a", "b"], negative_prompts=["hat"], **texts)


def test_a_base_says_which_guidance_it_wants(sd, tmp_path):
    assert sd.default_guidance == 1.0
    real = dataclasses.replace(sd, default_guidance=loading.GUIDANCE)
    assert loading.GUIDANCE == 7.5
    same(real.sample(0, ["a", "b"], **QUICK), sd.sample(0, ["a", "b"], guidance=7.5, **QUICK))
    for model, written in ((sd, True), (real, False)):
        folder = tmp_path / str(written)
        model.save_pretrained(folder)
        assert (folder / "sampling.json").exists() == written
        again = StableDiffusion.from_pretrained(folder)
        assert again.default_guidance == model.default_guidance
        assert again.replace_params({}).default_guidance == model.default_guidance
    (tmp_path / "True" / "sampling.json").write_text(json.dumps({"guidance": "much"}))
    with pytest.raises(UserError, match=r"sampling.json: guidance is 'much', expected a number"):
        StableDiffusion.from_pretrained(tmp_path / "True")


def test_the_repr_is_short(sd):
    assert repr(sd).startswith("StableDiffusion(SD, ") and base_path("tiny-sd") in repr(sd)
    assert len(repr(sd)) < 300
