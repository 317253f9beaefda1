"""The base model of configs/fonts.py: a tiny Stable Diffusion of letters at 32 pixels.

    tools/install_fonts.sh
    hyperlora pretrain --config configs/fonts_base.py --workdir runs/fonts/base

As configs/tiny_sd.py, with half as many steps of the autoencoder: 57 minutes on one core that other
work shared (17 of them the autoencoder's). Captions name letter, ink and paper, never the font.
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "tiny_sd.py")
    config.data.style = "fonts"
    config.data.num_identities = 300
    config.data.num_views = 96
    config.autoencoder.num_steps = 2000
    config.export.path = "runs/fonts/fonts-sd"
    return config
