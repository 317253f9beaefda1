"""Rendered 3-D heads (hyperlora_jax/worlds/heads.py), seen by an encoder of their own and judged by
two networks for real faces that training never saw. Packages and models are the user's to install:

    tools/install_heads.sh .venv/bin/python runs/heads/encoders
    hyperlora pretrain --config configs/heads_base.py --workdir runs/heads/base
    hyperlora pretrain --config configs/avatar_encoder.py --workdir runs/heads/encoder \
        --config.data.style=heads --config.data.size=32 --config.data.num_identities=2048 \
        --config.export.path=runs/heads/heads-encoder --config.export.name=heads-encoder \
        --config.train.num_steps=1000
    hyperlora pretrain --config configs/avatar_probe.py --workdir runs/heads/probe \
        --config.data.style=heads --config.data.size=32 --config.data.num_identities=768 \
        --config.export.path=runs/heads/heads-probe --config.export.name=heads-probe \
        --config.train.num_steps=600
    hyperlora distill  --config configs/heads.py --workdir runs/heads/main
    hyperlora train    --config configs/heads.py --workdir runs/heads/main
    hyperlora evaluate --config configs/heads.py --workdir runs/heads/main

A face recogniser as the condition instead:
`--config.model.encoder=runs/heads/encoders/condition.onnx`.

On one core that other work shared: base 47 minutes, encoder 28, probe 6, LoRAs 6, training 15 and
evaluation about 45. Identity on 48 held-out people: generated .71 (by the face recogniser .19),
conventional .76, nearest .26 (docs/results.md).
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "fonts.py")
    config.base = "runs/heads/heads-sd"
    config.data.style = "heads"
    config.data.size = 32
    config.data.num_identities = 1024
    config.data.num_views = 4
    config.model.encoder = "runs/heads/heads-encoder"
    config.train.num_steps = 1500
    config.train.num_references = (1, 1)
    config.evaluate.probe = "runs/heads/heads-probe"
    config.evaluate.judges = {
        "recogniser": "runs/heads/encoders/condition.onnx",
        "dlib": "runs/heads/encoders/judge.onnx",
    }
    return config
