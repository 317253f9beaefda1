"""The style set: typefaces from one picture of one letter (hyperlora_jax/data/fonts.py).

    tools/install_fonts.sh
    hyperlora pretrain --config configs/fonts_base.py --workdir runs/fonts/base
    hyperlora pretrain --config configs/avatar_encoder.py --workdir runs/fonts/encoder \
        --config.data.style=fonts --config.data.num_identities=300 --config.data.num_views=48 \
        --config.export.path=runs/fonts/fonts-encoder --config.export.name=fonts-encoder
    hyperlora pretrain --config configs/avatar_probe.py --workdir runs/fonts/probe \
        --config.data.style=fonts --config.data.num_identities=300 --config.data.num_views=48 \
        --config.export.path=runs/fonts/fonts-probe --config.export.name=fonts-probe
    hyperlora distill  --config configs/fonts.py --workdir runs/fonts/main
    hyperlora train    --config configs/fonts.py --workdir runs/fonts/main
    hyperlora evaluate --config configs/fonts.py --workdir runs/fonts/main

A subject is told by several letters: one letter says little of a font. These commands have not been
run yet, so there is no expected result.
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "avatars.py")
    config.base = "runs/fonts/fonts-sd"
    config.data.style = "fonts"
    config.data.num_identities = 300
    config.data.num_views = 24
    config.distill.num_concepts = 256
    config.model.encoder = "runs/fonts/fonts-encoder"
    config.train.num_references = (1, 4)
    config.evaluate.probe = "runs/fonts/fonts-probe"
    config.evaluate.num_identities = 48
    config.evaluate.conventional.num_identities = 48
    return config
