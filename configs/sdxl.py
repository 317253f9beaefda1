"""SDXL base 1.0 at 1024 pixels: the hypernetwork of configs/sd15.py, trained end to end through the
frozen UNet (q, k, v and out of all attention at rank 8: 560 layers, 11.6 M numbers).

    hyperlora compile --config configs/sdxl.py --topology v5p-128 --effort low
    hyperlora train   --config configs/sdxl.py --workdir gs://BUCKET/sdxl \
        --config.base=stabilityai/stable-diffusion-xl-base-1.0 \
        --config.model.encoder=ENCODER --config.data.source=FACES

As configs/sd15.py; `distill`, `refine` and full fine-tuning (configs/finetune_unet.py) take the
same base. Never trained; compiled for pods (docs/scaling.md), where the frozen models, 2.6 B
parameters in the UNet alone, and the trained state take 10.3 GiB of every chip: v5e has room for a
batch of 1 (`--config.train.batch_size=1`).
"""

import pathlib

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config

HERE = pathlib.Path(__file__).parent


def get_config() -> ConfigDict:
    config = parent_config(__file__, "sd15.py")
    config.base = str(HERE / "bases" / "sdxl")
    config.data.size = 1024
    config.train.remat = "full"
    config.train.batch_size = 4
    return config
