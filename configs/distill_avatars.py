"""A thousand avatars as a LoRA-target dataset, for learning in weight space.

hyperlora distill --config configs/distill_avatars.py --workdir runs/avatars_1024

`configs/avatars.py` with 1,024 LoRAs of 100 steps on a cosine schedule. May be killed and started
again at any moment. One CPU core: 23 minutes with other work beside it. Ends with
runs/avatars_1024/targets (97 MB), which carries its own data card.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    path = pathlib.Path(__file__).with_name("avatars.py")
    spec = importlib.util.spec_from_file_location("avatars", path)
    avatars = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(avatars)
    config = avatars.get_config()
    config.distill.num_concepts = 1024
    config.distill.num_steps = 100
    config.distill.recipe.schedule = "cosine"
    return config
