"""SD 2.x and SDXL at tiny sizes: UNets, and sampling against the pipeline's own loop."""

import itertools

import jax
import numpy as np
import pytest
import torch

from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from tests.user_world import write_base

from .conftest import SD1_SCHEDULER, flax_params, nchw, tiny_unet_config, torch_unet

# Odd latent sizes, two layers per block and a mid block without attention come along for free.
SD2_UNET = tiny_unet_config(
    attention_head_dim=[2, 4],
    use_linear_projection=True,
    upcast_attention=True,
    layers_per_block=2,
    mid_block_type="UNetMidBlock2D",
    norm_eps=1e-4,
)


# SSD-1B and Vega: other depths in every layer, one resnet in the middle.
SSD_UNET = tiny_unet_config(
    layers_per_block=2,
    attention_head_dim=[2, 4],
    use_linear_projection=True,
    mid_block_type="UNetMidBlock2D",
    down_block_types=["CrossAttnDownBlock2D"] * 2,
    up_block_types=["CrossAttnUpBlock2D"] * 2,
    transformer_layers_per_block=[1, [2, 0]],
    reverse_transformer_layers_per_block=[[2, 1, 0], 1],
)
NESTED_MID = {**SSD_UNET, "mid_block_type": "UNetMidBlock2DCrossAttn"}
LCM_UNET = tiny_unet_config(time_cond_proj_dim=10)


@pytest.mark.parametrize("config", [SD2_UNET, SSD_UNET, NESTED_MID, LCM_UNET])
@pytest.mark.parametrize("guided", [False, True])
def test_unets_equal_pytorch(config, guided, assert_parity):
    if guided and "time_cond_proj_dim" not in config:
        pytest.skip("has no guidance embedding")
    theirs = torch_unet(config)
    unet = unet_from_config(dict(theirs.config))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 5, 4)).astype(np.float32)
    states = rng.standard_normal((2, 5, 24)).astype(np.float32)
    guidance = {"timestep_cond": rng.standard_normal((2, 10)).astype(np.float32)} if guided else {}
    params = {"params": flax_params(theirs, unet)}
    ours = jax.jit(unet.apply)(params, x, np.array([3, 800]), states, guidance)
    with torch.no_grad():
        expected = theirs(
            nchw(x), torch.tensor([3, 800]), torch.from_numpy(states),
            **{name: torch.from_numpy(value) for name, value in guidance.items()},
        ).sample  # fmt: skip
    assert_parity(ours, expected)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_distilled_base_is_drawn_as_its_pipeline_draws(
    num_steps, tmp_path, assert_parity, monkeypatch
):
    """An LCM: guidance as an embedding, its own sampler by the scheduler's config."""
    from diffusers import LCMScheduler, StableDiffusionPipeline

    write_base(tmp_path, unet={"time_cond_proj_dim": 10})
    kept = LCMScheduler.from_config(SD1_SCHEDULER, original_inference_steps=40)
    kept.save_pretrained(tmp_path / "scheduler")
    sd = StableDiffusion.from_pretrained(tmp_path)
    assert sd.schedule.sampler == "lcm"
    noise = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    keys, numbers = jax.random.split(jax.random.key(5), 2), itertools.count()

    def fresh(shape, **_):
        number = next(numbers)
        rows = [jax.random.normal(jax.random.fold_in(k, number), (8, 8, 4)) for k in keys]
        return nchw(np.stack(rows))

    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", fresh)
    pipe = StableDiffusionPipeline.from_pretrained(
        tmp_path, scheduler=kept, safety_checker=None, requires_safety_checker=False
    )
    given = {"num_inference_steps": num_steps, "guidance_scale": 4.0, "latents": nchw(noise)}
    theirs = pipe(["a cat", "dog on"], output_type="pt", **given).images
    options = {"num_steps": num_steps, "guidance": 4.0, "latents": noise}
    ours = sd.sample(keys, ["a cat", "dog on"], **options)
    assert_parity(ours, theirs, 1e-4)
    with pytest.raises(UserError, match="distilled with its guidance"):
        sd.sample(0, ["a cat"], negative_prompts="dog")
    sd.save_pretrained(tmp_path / "again")
    assert StableDiffusion.from_pretrained(tmp_path / "again").schedule == sd.schedule
    LCMScheduler.from_pretrained(tmp_path / "again" / "scheduler")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_layers_of_the_text_encoder_are_left_out_as_in_the_pipeline(
    family, tiny_pipeline, tiny_xl, assert_parity
):
    root, pipe = tiny_pipeline if family == "sd1" else tiny_xl
    sd = StableDiffusion.from_pretrained(root)
    noise = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    options = {"negative_prompt": ["on", "on"], "height": 32, "width": 32}
    if family == "sd1":  # diffusers 0.42's own way needs an attribute that transformers 5 dropped
        ids = torch.from_numpy(sd.tokenize(["a cat", "dog"])).long()
        with torch.no_grad():
            states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
            options["prompt_embeds"] = pipe.text_encoder.final_layer_norm(states)
    else:
        options |= {"prompt": ["a cat", "dog"], "clip_skip": 1}
    theirs = pipe(
        num_inference_steps=2, guidance_scale=3.0, latents=nchw(noise), output_type="pt", **options
    ).images
    sampler = "ddim" if family == "sd1" else "euler"
    drawn = {"num_steps": 2, "guidance": 3.0, "latents": noise, "sampler": sampler}
    both = [
        sd.sample(0, ["a cat", "dog"], negative_prompts="on", clip_skip=skip, **drawn)
        for skip in (0, 1)
    ]
    assert_parity(both[1], theirs, 1e-3)
    assert np.abs(both[0] - both[1]).max() > 1e-3
    with pytest.raises(UserError, match="clip_skip is 3, expected 0 to"):
        sd.sample(0, ["a cat"], clip_skip=3)


@pytest.mark.parametrize("negative", [None, ["dog", "on"]])
def test_sdxl_prompts_and_sampling_equal_the_pipeline(tiny_xl, negative, assert_parity):
    root, pipe = tiny_xl
    sd = StableDiffusion.from_pretrained(root)
    prompts = ["a cat", "a dog on"]
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu")
    ours = sd.embed_prompts(prompts)
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
