"""The base model of configs/heads.py: a tiny Stable Diffusion of rendered heads at 32 pixels.

    tools/install_heads.sh .venv/bin/python runs/heads/encoders
    hyperlora pretrain --config configs/heads_base.py --workdir runs/heads/base

As configs/tiny_sd.py, for fewer steps: 47 minutes on one core that other work shared, 17 of them
the autoencoder's. Captions name expression, pose, light and background, never the person. Larger,
on an accelerator (not run): 64 pixels as 16 x 16 latents, a UNet of 9.4 million parameters:

    --config.data.size=64 --config.base.latent_size=16 --config.data.num_identities=8192
    --config.base.autoencoder.block_out_channels="(32,64,128)"
    --config.base.unet.block_out_channels="(96,192)"
    --config.autoencoder.num_steps=20000
    --config.train.num_steps=60000 --config.train.batch_size=128
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "tiny_sd.py")
    config.data.style = "heads"
    config.data.size = 32
    config.data.num_identities = 1024
    config.autoencoder.num_steps = 2400
    config.train.num_steps = 3000
    config.export.path = "runs/heads/heads-sd"
    return config
