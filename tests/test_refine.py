"""Refinement keeps what was generated and adds to it; files in, files out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.cli.main import main
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors, losses
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, spec_from_shapes, validate
from hyperlora_jax.lora_files import load_lora, read_metadata, save_lora
from hyperlora_jax.pictures.pictures import encode_png
from hyperlora_jax.refine import Refinement, refine_loras
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser, denoising_error
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params

CONFIG = {
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}


@pytest.fixture(name="world", scope="module")
def _world():
    unet = unet_from_config(CONFIG)
    schedule = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    params = {"unet": init_params(unet, jax.random.key(0))}
    sd = StableDiffusion(unet, params, schedule)
    spec = spec_from_shapes(params["unet"], "w2w", 2)
    random = np.random.default_rng(0)
    concepts = [
        (
            random.standard_normal((2, 4, 4, 3)).astype(np.float32),
            {"states": random.standard_normal((2, 5, 8)).astype(np.float32)},
        )
        for _ in range(3)
    ]
    generated = factors.init(jax.random.key(1), spec, 3)
    generated = jax.tree.map(lambda leaf: leaf + 0.02, generated)
    return sd, spec, concepts, generated


@pytest.fixture(name="refined", scope="module")
def _refined(world):
    sd, spec, concepts, generated = world
    recipe = Recipe(num_steps=25, images_per_step=2, learning_rate=2e-2)
    return refine_loras(
        sd, spec, generated, lambda k: concepts[k], Refinement(recipe, 3), num_slots=2,
        progress=None,
    )  # fmt: skip


def joined(concepts):
    return jax.tree.map(lambda *rows: np.concatenate(rows), *concepts)


def denoising(world, lora):
    sd, _, concepts, _ = world
    latents, text = joined(concepts)
    noise = jax.random.normal(jax.random.key(5), latents.shape)
    times = jnp.full(len(latents), 400)

    @jax.jit
    def error(lora):
        given = (sd.params["unet"], latents, text, times, noise)
        return denoising_error(Denoiser(sd.unet, sd.schedule), *given, lora=lora)

    errors = error(jax.tree.map(jnp.asarray, lora))
    return np.asarray(errors).reshape(3, 2).mean(axis=1)


def test_fits_the_pictures_better_and_keeps_the_generated_part(world, refined):
    generated = world[3]
    lora, joint = refined
    validate(lora, joint)
    assert joint.max_rank == 5
    assert np.all(denoising(world, lora) < denoising(world, generated))
    first = jax.tree.leaves(generated, is_leaf=factors.is_site)
    for pair, kept in zip(jax.tree.leaves(lora, is_leaf=factors.is_site), first, strict=True):
        np.testing.assert_array_equal(pair["down"][..., :2], kept["down"])
        np.testing.assert_array_equal(pair["up"][:, :2], kept["up"])


def test_keep_rank_is_the_best_cut_of_the_sum(world, refined):
    sd, spec, concepts, generated = world
    lora = refined[0]
    recipe = Recipe(num_steps=25, images_per_step=2, learning_rate=2e-2)
    cut, kept_spec = refine_loras(
        sd, spec, generated, lambda k: concepts[k], Refinement(recipe, 3, 4),
        num_slots=2, progress=None,
    )  # fmt: skip
    assert kept_spec.max_rank == 4
    assert np.all(losses.relative_delta_error(cut, lora) < 0.2)
    with pytest.raises(UserError, match="ranks must be at least 1"):
        refine_loras(sd, spec, generated, lambda k: concepts[k], Refinement(rank=0))


def test_every_lora_is_refined_on_its_own_number_of_pictures(world):
    """Whoever is refined beside it."""
    sd, spec, concepts, generated = world
    every = joined(concepts)
    parts = (slice(5), slice(5, None))
    own = [jax.tree.map(lambda rows, part=part: rows[part], every) for part in parts]
    recipe = Recipe(num_steps=5, images_per_step=2, learning_rate=2e-2)
    singles = [factors.index(generated, k) for k in range(2)]

    def refined(numbers):
        most = max(len(own[k][0]) for k in numbers)
        lora, _ = refine_loras(
            sd, spec, [singles[k] for k in numbers], lambda k: own[numbers[k]],
            Refinement(recipe, 2), num_slots=1, max_images=most, progress=None,
        )  # fmt: skip
        return lora

    both = refined([1, 0])
    alone = refined([1])
    for ours, theirs in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours[:1], theirs, atol=1e-5)
    assert max(float(jnp.abs(leaf[0] - leaf[1]).max()) for leaf in jax.tree.leaves(both)) > 1e-3


@pytest.mark.slow
def test_command_refines_one_file_and_a_folder(tmp_path, capsys):
    sd = load_base("tiny-sd")
    spec = sd.lora_spec("w2w", 1)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, factors.init(jax.random.key(0), spec))
    facts = {"base": "tiny-sd", "base_hash": sd.base_hash, "seed": 3}
    random = np.random.default_rng(0)
    for name in ("anna", "bert"):
        save_lora(
            tmp_path / "loras" / f"{name}.safetensors", lora, spec, family="sd1", metadata=facts
        )
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for k in range({"anna": 2, "bert": 3}[name]):
            picture = random.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            (folder / f"{k}.png").write_bytes(encode_png(picture))
    common = ["--num_steps", "2", "--rank", "2", "--dtype", "float32"]
    one = ["refine", str(tmp_path / "loras" / "anna.safetensors")]
    one += ["--images", str(tmp_path / "images" / "anna"), "--out"]
    assert main([*one, str(tmp_path / "one.safetensors"), *common]) == 0
    refined, joint = load_lora(tmp_path / "one.safetensors", sd)
    assert joint.max_rank == 3
    assert float(losses.relative_delta_error(refined, lora)) > 1e-4
    header = read_metadata(tmp_path / "one.safetensors")
    assert (header["hyperlora.seed"], header["hyperlora.refined_steps"]) == ("3", "2")
    many = ["refine", str(tmp_path / "loras"), "--images", str(tmp_path / "images")]
    assert main([*many, "--out", str(tmp_path / "many"), *common]) == 0
    again, _ = load_lora(tmp_path / "many" / "anna.safetensors", sd)
    assert float(losses.relative_delta_error(again, refined)) < 1e-3
    (tmp_path / "loras" / "carl.safetensors").write_bytes(
        (tmp_path / "loras" / "anna.safetensors").read_bytes()
    )
    assert main([*many, "--out", str(tmp_path / "many"), *common]) == 2
    assert "has no folder 'carl' with the pictures of" in capsys.readouterr().err
    wrong = ["refine", str(tmp_path / "loras" / "anna.safetensors")]
    wrong += ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "x"), *common]
    assert main(wrong) == 2
    assert "expected the pictures of one subject" in capsys.readouterr().err


def test_a_folder_of_one_lora_is_one_and_text_layers_are_refused_at_once(tmp_path, capsys):
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    spec = LoraSpec((LoraSite(path, 64, 64, 1),))
    save_lora(tmp_path / "lora", factors.init(jax.random.key(0), spec), spec, "diffusers")
    command = ["refine", str(tmp_path / "lora"), "--images", str(tmp_path), "--out", "x"]
    assert main([*command, "--base", "tiny-sd"]) == 2
    said = capsys.readouterr().err
    assert "refining trains UNet layers only" in said and "--drop text_encoder" in said
