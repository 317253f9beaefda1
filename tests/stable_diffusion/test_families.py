"""SD 2.x and SDXL at tiny sizes: UNets, and sampling against the pipeline's own loop."""

import jax
import numpy as np
import pytest
import torch

from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.unet import unet_from_config

from .conftest import (
    flax_params,
    nchw,
    tiny_unet_config,
    torch_unet,
)

# Odd latent sizes, two layers per block and a mid block without attention come along for free.
SD2_UNET = tiny_unet_config(
    attention_head_dim=[2, 4],
    use_linear_projection=True,
    upcast_attention=True,
    layers_per_block=2,
    mid_block_type="UNetMidBlock2D",
    norm_eps=1e-4,
)


def test_sd2_unet_equals_pytorch(assert_parity):
    theirs = torch_unet(SD2_UNET)
    unet = unet_from_config(dict(theirs.config))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 5, 4)).astype(np.float32)
    states = rng.standard_normal((2, 5, 24)).astype(np.float32)
    ours = jax.jit(unet.apply)({"params": flax_params(theirs, unet)}, x, np.array([3, 800]), states)
    with torch.no_grad():
        expected = theirs(nchw(x), torch.tensor([3, 800]), torch.from_numpy(states)).sample
    assert_parity(ours, expected)


@pytest.mark.parametrize("negative", [None, ["dog", "on"]])
def test_sdxl_prompts_and_sampling_equal_the_pipeline(tiny_xl, negative, assert_parity):
    root, pipe = tiny_xl
    sd = StableDiffusion.from_pretrained(root)
    prompts = ["a cat", "a dog on"]
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu")
    ours = sd.encode_conditions(prompts)
    assert_parity(ours["states"], states)
    assert_parity(ours["pooled"], pooled)
    noise = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    theirs = pipe(
        prompts,
        num_inference_steps=3,
        guidance_scale=3.0,
        negative_prompt=negative,
        latents=nchw(noise),
        height=32,
        width=32,
        output_type="pt",
    ).images
    images = sd.sample(
        jax.random.key(0),
        prompts,
        num_steps=3,
        guidance=3.0,
        negative_prompts=negative,
        latents=noise,
        sampler="euler",
    )
    assert_parity(images, theirs, 1e-3)


def test_sdxl_export_loads_in_pytorch(tiny_xl, tmp_path, assert_parity):
    from diffusers import StableDiffusionXLPipeline

    root, pipe = tiny_xl
    sd = StableDiffusion.from_pretrained(root)
    sd.save_pretrained(tmp_path, dtype="float32")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
            mine, theirs = getattr(again, name).state_dict(), getattr(pipe, name).state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
