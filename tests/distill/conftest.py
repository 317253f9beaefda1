"""A UNet of one small block, and five concepts of two or three pictures."""

import dataclasses

import jax
import numpy as np
import pytest

from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.distill import distillation
from hyperlora_jax.lora.sites import spec_from_shapes
from hyperlora_jax.stable_diffusion.embedded import load_base
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
    params = init_params(unet, jax.random.key(0))
    spec = spec_from_shapes(params, "w2w", 2)
    random = np.random.default_rng(0)
    concepts = [
        (
            random.standard_normal((3 - k % 2, 4, 4, 3)).astype(np.float32),
            {"states": random.standard_normal((3 - k % 2, 5, 8)).astype(np.float32)},
        )
        for k in range(5)
    ]
    schedule = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return unet, params, schedule, spec, concepts


@pytest.fixture(name="small_base", scope="module")
def _small_base():
    """`distill` sees the embedded base with a UNet that compiles in seconds."""
    sd = load_base("tiny-sd")
    small = {**CONFIG, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64}
    unet = unet_from_config({**small, "sample_size": 8})
    drawn = sd.replace_params({"unet": init_params(unet, jax.random.key(0))})
    sd = dataclasses.replace(drawn, unet=unet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "load_frozen", lambda *_: sd)
        yield sd
