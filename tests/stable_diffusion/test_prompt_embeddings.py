"""SDXL's added conditions travel with the text: losses equal PyTorch's, every stage runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hyperlora_jax.cli.main import main
from hyperlora_jax.lora_files.reading import load_lora
from hyperlora_jax.pictures import pictures
from hyperlora_jax.stable_diffusion import prompt_embeddings
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser, denoising_error
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.train.json_lines import read_rows

from .conftest import nchw

PROMPTS = ["a cat", "a dog on"]


def test_the_loss_equals_pytorchs(tiny_xl, assert_parity):
    root, pipe = tiny_xl
    sd = StableDiffusion.from_pretrained(root)
    rng = np.random.default_rng(0)
    latents, noise = rng.standard_normal((2, 2, 8, 6, 4)).astype(np.float32)
    timesteps = np.array([3, 800])
    text = prompt_embeddings.encode(sd, PROMPTS, (32, 24))
    shapes = prompt_embeddings.row_shapes(sd.unet.settings, 16)
    assert {name: rows.shape for name, rows in text.items()} == {
        name: (2, *shape) for name, shape in shapes.items()
    }
    assert shapes == {"states": (16, 56), "pooled": (20,), "time_ids": (6,)}

    @jax.jit
    def error(text):
        given = (sd.params["unet"], latents, text, timesteps, noise)
        return denoising_error(Denoiser(sd.unet, sd.schedule), *given)

    ours = error(text)
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu")
        sizes = torch.tensor([[32.0, 24.0, 0.0, 0.0, 32.0, 24.0]] * 2)
        noisy = pipe.scheduler.__class__.from_config(pipe.scheduler.config)
        alphas = noisy.alphas_cumprod[timesteps].float()[:, None, None, None]
        given = alphas.sqrt() * nchw(latents) + (1 - alphas).sqrt() * nchw(noise)
        added = {"text_embeds": pooled, "time_ids": sizes}
        predicted = pipe.unet(
            given, torch.tensor(timesteps), states, added_cond_kwargs=added
        ).sample
        theirs = (predicted - nchw(noise)).square().mean((1, 2, 3))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4)
    for name in text:  # all are heard
        assert np.abs(error({**text, name: text[name] + 9.0}) - ours).max() > 1e-6


def test_no_prompt_is_what_guidance_takes(tiny_xl):
    sd = StableDiffusion.from_pretrained(tiny_xl[0])
    nothing = prompt_embeddings.encode_nothing(sd, (32, 24))
    for name in ("states", "pooled"):
        np.testing.assert_array_equal(nothing[name], 0.0)
    np.testing.assert_array_equal(nothing["time_ids"], [[32, 24, 0, 0, 32, 24]])
    tiny = load_base("tiny-sd")
    plain = prompt_embeddings.encode_nothing(tiny, (16, 16))
    assert list(plain) == ["states"]
    np.testing.assert_array_equal(plain["states"], tiny.encode_prompt([""]))


@pytest.fixture(name="people", scope="module")
def _people(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    for name in ("anna", "bert", "carl"):
        (root / name).mkdir()
        for k in range(2):
            picture = random.integers(0, 255, (32, 32, 3), np.uint8)
            (root / name / f"{k}.png").write_bytes(pictures.encode_png(picture))
            (root / name / f"{k}.txt").write_text(PROMPTS[k])
    return root


def flags(**values):
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]


@pytest.mark.slow
def test_from_pictures_to_loras_and_another_base(tiny_xl, people, tmp_path):
    base = str(tiny_xl[0])
    run = tmp_path / "run"
    shared = ["--config", "configs/avatars.py", "--workdir", str(run)]
    shared += flags(base=base, data__source=people, data__num_identities=3)
    assert main([
        "distill", *shared,
        *flags(distill__num_concepts=3, distill__num_slots=2, distill__num_steps=4,
               distill__steps_per_call=2, distill__encoders="()",
               distill__recipe__images_per_step=2),
    ]) == 0  # fmt: skip
    assert main([
        "train", *shared,
        *flags(train__num_steps=3, train__batch_size=2, train__log_every_steps=1,
               train__images_per_subject=1, train__objectives__delta=1.0,
               train__objectives__prior=0.1, model__network__width=16, model__network__depth=1,
               model__network__num_heads=2),
    ]) == 0  # fmt: skip
    losses = [row["loss"] for row in read_rows(run / "metrics.jsonl")]
    assert len(losses) == 3 and np.isfinite(losses).all()
    out = tmp_path / "anna.safetensors"
    reference = str(people / "anna" / "0.png")
    generate = ["generate", "--checkpoint", str(run), "--reference", reference, "--out", str(out)]
    assert main([*generate, "--format", "diffusers"]) == 0
    lora, _ = load_lora(out)
    sd = StableDiffusion.from_pretrained(base)
    drawn = sd.sample(jax.random.key(0), PROMPTS, lora=lora, num_steps=2, guidance=1.0)
    assert drawn.shape == (2, 32, 32, 3) and bool(jnp.isfinite(drawn).all())
    refined = tmp_path / "refined.safetensors"
    assert main([
        "refine", str(out), "--images", str(people / "anna"), "--out", str(refined),
        "--num_steps", "2", "--base", base,
    ]) == 0  # fmt: skip
    assert refined.exists()
    tuned = tmp_path / "tuned"
    assert main([
        "pretrain", "--config", "configs/finetune_unet.py", "--workdir", str(tuned),
        *flags(base=base, data__source=people, data__num_identities=3, train__num_steps=2,
               train__batch_size=2, train__log_every_steps=1, train__caption_dropout=0.5),
    ]) == 0  # fmt: skip
    assert StableDiffusion.from_pretrained(tuned / "base").is_xl
