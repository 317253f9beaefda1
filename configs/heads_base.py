"""The base model of configs/heads.py: a small Stable Diffusion of rendered heads at 64 pixels.

    hyperlora pretrain --config configs/heads_base.py --workdir runs/heads/base

As configs/tiny_sd.py, wider and longer: 16 x 16 latents, a UNet of 9.4 million parameters.
Captions name expression, pose, light and background, never the person.
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "tiny_sd.py")
    config.data.style = "heads"
    config.data.num_identities = 8192
    config.base.latent_size = 16
    config.base.autoencoder.block_out_channels = (32, 64, 128)
    config.base.unet.block_out_channels = (96, 192)
    config.autoencoder.num_steps = 20_000
    config.train.num_steps = 60_000
    config.train.batch_size = 128
    config.export.path = "runs/heads/heads-sd"
    return config
