"""A thousand avatars as a LoRA-target dataset, for learning in weight space.

hyperlora distill --config configs/distill_avatars.py --workdir runs/avatars_1024

`configs/avatars.py` with 1,024 LoRAs of 100 steps on a cosine schedule. May be killed and started
again at any moment. One CPU core: 23 minutes with other work beside it. Ends with
runs/avatars_1024/targets (97 MB), which carries its own data card.
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "avatars.py")
    config.distill.num_concepts = 1024
    config.distill.num_steps = 100
    config.distill.recipe.schedule = "cosine"
    return config
