"""The base model of configs/heads.py: a small Stable Diffusion of rendered heads at 64 pixels.

    tools/install_heads.sh .venv/bin/python runs/heads/encoders
    hyperlora pretrain --config configs/heads_base.py --workdir runs/heads/base

As configs/tiny_sd.py, with an autoencoder of one more level: 8 x 8 latents of 64 x 64 pixels, a UNet
of 0.6 million parameters, TIME. Captions name expression, pose, light and background, never the
person.

On an accelerator, 16 x 16 latents, a UNet of 9.4 million parameters (not run yet):

    --config.base.latent_size=16 "--config.base.autoencoder.block_out_channels=(32,64,128)"
    "--config.base.unet.block_out_channels=(96,192)" --config.data.num_identities=8192
    --config.autoencoder.num_steps=20000 --config.autoencoder.batch_size=32
    --config.train.num_steps=60000 --config.train.batch_size=128
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "tiny_sd.py")
    config.data.style = "heads"
    config.data.num_identities = 1024
    config.base.autoencoder.block_out_channels = (8, 16, 32, 64)
    config.autoencoder.num_steps = 2000
    config.autoencoder.batch_size = 16
    config.export.path = "runs/heads/heads-sd"
    return config
