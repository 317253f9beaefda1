"""Stronger LoRAs than weights2weights': q, k, v and out at rank 8, min-SNR weighting, captions.

hyperlora distill --config configs/distill_strong.py --workdir runs/strong \
    --config.data.source=CONCEPTS --config.distill.num_concepts=1000

Gradients of two batches of two pictures a step (`accumulate`), mirrored pictures, a fit that stops
when 200 more steps no longer lower its loss. 1.6 M numbers a LoRA.
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "distill_w2w.py")
    config.distill.preset, config.distill.rank = "attn-qkvo", 8
    config.distill.num_steps = 1200
    config.distill.flips, config.distill.prompt = True, ""
    config.distill.recipe = ConfigDict(
        {
            "images_per_step": 2,
            "accumulate": 2,
            "learning_rate": 2e-4,
            "warmup_steps": 50,
            "min_snr_gamma": 5.0,
            "plateau_window": 200,
            "init_seed": 0,
        }
    )
    return config
