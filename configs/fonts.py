"""The style set: typefaces from one picture of one letter (hyperlora_jax/worlds/fonts.py).

    tools/install_fonts.sh
    hyperlora pretrain --config configs/fonts_base.py --workdir runs/fonts/base
    hyperlora pretrain --config configs/avatar_encoder.py --workdir runs/fonts/encoder \
        --config.data.style=fonts --config.data.num_identities=300 --config.data.num_views=48 \
        --config.export.path=runs/fonts/fonts-encoder --config.export.name=fonts-encoder \
        --config.train.num_steps=1000
    hyperlora pretrain --config configs/avatar_probe.py --workdir runs/fonts/probe \
        --config.data.style=fonts --config.data.num_identities=300 --config.data.num_views=48 \
        --config.export.path=runs/fonts/fonts-probe --config.export.name=fonts-probe \
        --config.train.num_steps=600
    hyperlora distill  --config configs/fonts.py --workdir runs/fonts/main
    hyperlora train    --config configs/fonts.py --workdir runs/fonts/main
    hyperlora evaluate --config configs/fonts.py --workdir runs/fonts/main

A font is told by one letter or by several: training draws one to four, evaluation shows one. On one
core that other work shared: base 57 minutes, encoder 27, probe 5, LoRAs 9, training 29, evaluation
34. Identity on 48 held-out fonts: generated .23, conventional .51, nearest .14 (docs/results.md).
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
    config.distill.num_steps = 100
    config.distill.recipe.schedule = "cosine"
    config.distill.encoders = ()
    config.train.num_steps = 2000
    config.train.num_references = (1, 4)
    config.evaluate.probe = "runs/fonts/fonts-probe"
    config.evaluate.num_identities = 48
    config.evaluate.conventional.num_identities = 48
    config.evaluate.conventional.num_validation = 8
    config.evaluate.steps_to_quality.num_identities = 0
    config.evaluate.strengths = (1.0, 1.5, 2.0)
    config.evaluate.methods = (
        "base", "mean_lora", "shuffled", "nearest", "generated", "refined_25", "conventional_1",
        "conventional",
    )  # fmt: skip
    return config
