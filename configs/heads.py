"""Rendered 3-D heads (hyperlora_jax/data/heads.py) with a face-recognition encoder as condition and
another one, that training never saw, as judge. Packages and models are the user's to install:

    tools/install_heads.sh .venv/bin/python runs/heads/encoders
    hyperlora pretrain --config configs/heads_base.py --workdir runs/heads/base
    hyperlora pretrain --config configs/avatar_probe.py --workdir runs/heads/probe \
        --config.data.style=heads --config.data.num_identities=2048 \
        --config.export.path=runs/heads/heads-probe --config.export.name=heads-probe
    hyperlora distill  --config configs/heads.py --workdir runs/heads/main
    hyperlora train    --config configs/heads.py --workdir runs/heads/main
    hyperlora evaluate --config configs/heads.py --workdir runs/heads/main

Meant for an accelerator: a base of 64-pixel faces with a UNet of 9.4 million parameters. It
has been run on two CPU cores with a few steps of every stage only, so there is no expected result.
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "avatars.py")
    config.base = "runs/heads/heads-sd"
    config.data.style = "heads"
    config.data.num_identities = 8192
    config.distill.num_concepts = 512
    config.distill.num_steps = 400
    config.model.encoder = "runs/heads/encoders/condition.onnx"
    config.model.network.width = 256
    config.train.num_steps = 20_000
    config.train.batch_size = 32
    config.train.optimizer.learning_rate = 1e-3
    config.evaluate.probe = "runs/heads/heads-probe"
    config.evaluate.judges.independent = "runs/heads/encoders/judge.onnx"
    config.evaluate.conventional.recipe.num_steps = 800
    config.evaluate.steps_to_quality.checkpoints = (0, 5, 10, 25, 50, 100, 200, 400, 800)
    return config
