"""A small Stable Diffusion directory with only a UNet, drawn without compiling anything."""

import jax
import numpy as np

from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.flax_trees import param_shapes

CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}


def save(path, seed=0):
    unet = unet_from_config(CONFIG)
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), param_shapes(unet)
    )
    base = StableDiffusion(unet=unet, params={"unet": params}, schedule=NoiseSchedule())
    base.save_pretrained(path, "float32")
    return StableDiffusion.from_pretrained(path)
