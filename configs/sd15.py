"""Stable Diffusion 1.5 at 512 pixels: a hypernetwork of 300 M parameters, trained end to end
through the frozen UNet (q, k, v and out of all attention at rank 8: 128 layers, 3.2 M numbers).

    hyperlora compile --config configs/sd15.py --topology v5e-256 --effort low
    hyperlora train   --config configs/sd15.py --workdir gs://BUCKET/sd15 \
        --config.base=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --config.model.encoder=ENCODER --config.data.source=FACES

`compile` needs no weights: configs/bases/sd15 holds nothing but the base's config.json files.
FACES is a folder of pictures per subject, ENCODER any condition encoder (docs/hypernetworks.md); no
dataset of LoRAs is needed. Compiled for pods (docs/scaling.md), never trained.
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
    config.model.rank = 8
    config.model.network = {
        "width": 1024,
        "depth": 10,
        "num_heads": 16,
        "mlp_ratio": 4,
        "conditioning": "adanorm",
        "head": "dense",
        "components_per_token": 8,
        "scan": True,
        "dtype": "bfloat16",
    }
    config.train.dtype = "bfloat16"
    config.train.remat = "save_attention"
    config.train.batch_size = 16
    config.train.batch_per_device = True
    config.train.images_per_subject = 1
    config.train.num_steps = 200000
    config.train.min_snr_gamma = 5.0
    config.train.optimizer.learning_rate = 1e-4
    config.train.optimizer.warmup_steps = 2000
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    return config
