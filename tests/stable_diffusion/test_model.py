import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora_files import save_lora
from hyperlora_jax.stable_diffusion.model import StableDiffusion

from .conftest import nchw

PROMPTS = ["a cat on", "dog", "zebra cat dog a a a a a a"]


@pytest.fixture(scope="module")
def models(tiny_pipeline):
    root, pipe = tiny_pipeline
    return StableDiffusion.from_pretrained(root), pipe


def random_lora(spec, num=None, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32),
        factors.zeros(spec, num),
    )


def test_modules_equal_pytorch(models, assert_parity):
    sd, pipe = models
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 8, 4)).astype(np.float32)
    timesteps = np.array([1, 500, 999])
    images = rng.uniform(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        states, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
        assert_parity(sd.encode_prompt(PROMPTS), states)
        theirs = pipe.unet(nchw(x), torch.from_numpy(timesteps), states).sample
        apply = jax.jit(sd.unet.apply)
        ours = apply({"params": sd.params["unet"]}, x, timesteps, states.numpy())
        assert_parity(ours, theirs)
        posterior = pipe.vae.encode(2 * nchw(images) - 1).latent_dist
        latents = sd.encode_images(images)
        assert_parity(latents, 0.5 * posterior.mean)
        decoded = pipe.vae.decode(posterior.mean).sample
        assert_parity(sd.decode_latents(latents), (decoded / 2 + 0.5).clamp(0, 1))


def test_guided_sampling_equals_the_pipeline(models, assert_parity):
    sd, pipe = models
    noise = np.random.default_rng(1).standard_normal((3, 8, 8, 4)).astype(np.float32)
    theirs = pipe(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=3.0,
        negative_prompt=["dog"] * 3,
        latents=nchw(noise),
        output_type="pt",
    ).images
    ours = sd.sample(
        jax.random.key(0),
        PROMPTS,
        num_steps=4,
        guidance=3.0,
        negative_prompts=["dog"] * 3,
        latents=noise,
    )
    assert_parity(ours, theirs, 1e-3)


def test_loras_on_the_conditional_branch_are_those_of_the_documented_recipe(
    models, tiny_pipeline, tmp_path, assert_parity
):
    from diffusers import StableDiffusionPipeline

    sd, document = models[0], Path(__file__).parents[2] / "docs" / "gpu_inference.md"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline[0])
    pipe.set_progress_bar_config(disable=True)
    spec = sd.lora_spec("attn-qkvo", 2)
    lora = random_lora(spec, None)
    save_lora(tmp_path / "lora.safetensors", lora, spec, dtype="float32", family="sd1")
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="subject")
    noise = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)

    def render(prompt):
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
        return pipe([prompt, "dog"], latents=nchw(noise), **options).images

    block = re.search(r"```python\n(def on_prompt_only.*?)```", document.read_text(), re.DOTALL)
    assert block
    names = {"pipe": pipe, "render": render, "torch": torch}
    exec(compile(block[1], str(document), "exec"), names)
    options = {"num_steps": 2, "guidance": 3.0, "latents": noise}
    prompts = ["a portrait", "dog"]
    ours = sd.sample(0, prompts, lora, lora_branches="conditional", **options)
    assert_parity(ours, names["image"], 1e-3)
    assert np.abs(ours - sd.sample(0, prompts, lora, **options)).max() > 0.01


def test_sampling_gives_every_image_its_own_lora(models):
    sd, _ = models
    lora = random_lora(sd.lora_spec("all", 2), 2)
    noise = np.random.default_rng(1).standard_normal((4, 8, 8, 4)).astype(np.float32)
    prompts = ["a", "cat", "dog", "on"]
    key = jax.random.key(0)
    options = {"num_steps": 2, "guidance": 2.0, "strength": 0.7}
    together = sd.sample(key, prompts, lora, latents=noise, **options)
    for k in range(4):
        alone = sd.sample(
            key,
            prompts[k : k + 1],
            factors.index(lora, k // 2),
            latents=noise[k : k + 1],
            **options,
        )
        np.testing.assert_allclose(together[k], alone[0], atol=2e-4)
    base = sd.sample(key, prompts, latents=noise, num_steps=2, guidance=2.0)
    assert np.abs(base - together).max() > 0.02


def test_export_loads_in_pytorch_and_keeps_the_base_hash(models, tmp_path, assert_parity):
    from diffusers import StableDiffusionPipeline

    sd, _ = models
    sd.save_pretrained(tmp_path, dtype="float16")
    again = StableDiffusion.from_pretrained(tmp_path)
    assert again.base_hash == sd.base_hash == again.base_hash
    assert not (tmp_path / "unet" / "base_hash.json").exists()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        states, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
        assert_parity(again.encode_prompt(PROMPTS), states)
        x = np.random.default_rng(0).standard_normal((3, 8, 8, 4)).astype(np.float32)
        theirs = pipe.unet(nchw(x), torch.tensor(3), states).sample
    apply = jax.jit(again.unet.apply)
    ours = apply({"params": again.params["unet"]}, x, np.full(3, 3), states.numpy())
    assert_parity(ours, theirs)


def test_missing_component_is_an_error_when_it_is_used(models, tmp_path):
    sd, _ = models
    sd.save_pretrained(tmp_path)
    for name in ("vae", "text_encoder"):
        (tmp_path / name).rename(tmp_path / f"no_{name}")
    partial = StableDiffusion.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="text_encoder: folder not found"):
        partial.encode_prompt(["a"])
    with pytest.raises(UserError, match="vae: folder not found"):
        partial.decode_latents(np.zeros((1, 8, 8, 4), np.float32))
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors"):
        StableDiffusion.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        StableDiffusion.from_pretrained(tmp_path / "nowhere")
