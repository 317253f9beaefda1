"""The avatar world on the embedded tiny base: distil, train, evaluate.

hyperlora distill  --config configs/avatars.py --workdir runs/avatars
hyperlora train    --config configs/avatars.py --workdir runs/avatars
hyperlora evaluate --config configs/avatars.py --workdir runs/avatars

On one of two CPU cores training took 67 minutes beside other work; the conventional LoRAs of all 14
methods are what an evaluation waits for. Identity top-1 of 32 on 64 held-out identities: generated
.91, refined for 25 steps .96, conventional .93 (docs/results.md).

All keys and what they mean: `hyperlora train --config configs/avatars.py --print_config`.
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli import sections


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "base": "tiny-sd",
            "data": sections.world(),
            "distill": sections.distill(num_concepts=256, encoders=("avatar",)),
            "model": sections.model(),
            "train": sections.train(
                num_steps=6000, batch_size=16, optimizer={"learning_rate": 2e-3}
            ),
            "generate": sections.generate(),
            "evaluate": sections.evaluate(
                methods=(
                    "base",
                    "mean_lora",
                    "nearest",
                    "knn",
                    "ridge",
                    "pca_gaussian",
                    "shuffled",
                    "noisy_copy",
                    "generated",
                    "refined_25",
                    "conventional_1",
                    "conventional",
                ),
                steps_to_quality={"num_identities": 16},
                conventional={
                    "recipe": {
                        "num_steps": 300,
                        "images_per_step": 8,
                        "learning_rate": 1e-2,
                        "schedule": "cosine",
                    }
                },
                refine={"recipe": {"images_per_step": 8, "learning_rate": 1e-2}},
            ),
            "mesh": sections.mesh(),
        }
    )
