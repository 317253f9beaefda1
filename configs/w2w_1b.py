"""A hypernetwork of 1 B parameters on weights2weights tokens (Stable Diffusion 1.5, q and v at
rank 1: 128 tokens, 99,648 numbers), learned in weight space from imported LoRAs.

    hyperlora compile --config configs/w2w_1b.py --topology v5e-16 --effort low
    hyperlora train   --config configs/w2w_1b.py --workdir gs://BUCKET/w2w \
        --config.base=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --config.data.source=FACES --config.data.targets=LORAS

`compile` needs no weights: configs/bases/sd15 holds nothing but the base's config.json files.
FACES is a folder of pictures per subject, LORAS what `hyperlora import` made of the LoRA vectors.
"""

import pathlib

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config

HERE = pathlib.Path(__file__).parent


def get_config() -> ConfigDict:
    config = parent_config(__file__, "avatars.py")
    config.base = str(HERE / "bases" / "sd15")
    config.data.size = 512
    config.data.num_identities = 60000
    config.model.preset = "w2w"
    config.model.rank = 1
    config.model.network = {
        "width": 1536,
        "depth": 18,
        "num_heads": 16,
        "mlp_ratio": 4,
        "conditioning": "adanorm",
        "head": "dense",
        "scan": True,
        "remat": True,
        "dtype": "bfloat16",
    }
    config.train.objectives.end_to_end = 0.0
    config.train.objectives.delta = 0.1
    config.train.objectives.whitened = 1.0
    config.train.batch_size = 32
    config.train.batch_per_device = True
    config.train.images_per_subject = 1
    config.train.num_steps = 100000
    config.train.optimizer.learning_rate = 1e-4
    config.train.optimizer.warmup_steps = 2000
    # 16 chips hold it easily; parameters are gathered among neighbours, gradients summed over all.
    config.mesh = {"data": -1, "fsdp": 16, "tensor": 1}
    return config
