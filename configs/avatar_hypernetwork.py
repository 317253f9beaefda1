"""The hypernetwork that ships with the package, small enough for it: `hyperlora serve` opens it.

    hyperlora train    --config configs/avatar_hypernetwork.py --workdir runs/shipped
    hyperlora evaluate --config configs/avatar_hypernetwork.py --workdir runs/shipped

Then `hyperlora export runs/shipped --dtype float16 --out DIR` (docs/embedded_models.md). Two CPU
cores beside other work: 24 minutes. Identity top-1 of 32 on 64 held-out identities: .84.
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "avatars.py")
    config.data.num_identities = 1536
    config.model.network.width = 48
    config.train.num_steps = 900
    config.train.checkpoint_every_steps = 100
    config.evaluate.methods = ("base", "shuffled", "generated")
    config.evaluate.num_validation = 8
    config.evaluate.steps_to_quality.num_identities = 0
    config.evaluate.strengths = (1.0, 1.5, 2.0)
    return config
