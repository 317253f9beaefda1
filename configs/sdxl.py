"""SDXL base 1.0 at 1024 pixels: a hypernetwork as large as that of configs/sd15.py, trained end to
end through the frozen UNet (all attention at rank 8: 560 layers, 11.6 M numbers).

    hyperlora compile  --config configs/sdxl.py --topology v5p-128 --effort low
    hyperlora distill  --config configs/sdxl.py --workdir gs://BUCKET/sdxl \
        --config.base=stabilityai/stable-diffusion-xl-base-1.0 \
        --config.model.encoder=ENCODER --config.data.source=FACES
    hyperlora train    --config configs/sdxl.py --workdir gs://BUCKET/sdxl
    hyperlora evaluate --workdir gs://BUCKET/sdxl --config.evaluate.judges.independent=JUDGE

FACES, ENCODER, JUDGE and what may be left out: see configs/sd15.py. Never trained; compiled for
pods (docs/scaling.md), where the frozen models, 2.6 B parameters in the UNet alone, and the trained
state take 10.3 GiB of every chip: v5e has room for a batch of 1 (`--config.train.batch_size=1`).
"""

import pathlib

from ml_collections import ConfigDict

from hyperlora_jax.cli import sections

BASES = pathlib.Path(__file__).parent / "bases"


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "base": str(BASES / "sdxl"),
            "data": sections.data(size=1024),
            "distill": sections.distill(
                num_concepts=256,  # for the controls of the evaluation
                num_steps=1200,
                num_slots=4,
                dtype="bfloat16",
                remat="full",
                encode_batch_size=2,
                recipe={
                    "images_per_step": 1,
                    "accumulate": 4,
                    "learning_rate": 2e-4,
                    "schedule": "constant",
                    "warmup_steps": 50,
                    "min_snr_gamma": 5.0,
                    "init_seed": 0,
                },
            ),
            "model": sections.model(
                encoder="",  # no default: the shipped ones know drawings only
                preset="attn-qkvo",
                rank=8,
                network={
                    "width": 1024,
                    "depth": 10,
                    "num_heads": 16,
                    "mlp_ratio": 4,
                    "conditioning": "adanorm",
                    "head": "dense",
                    "components_per_token": 8,
                    "scan": True,
                    "dtype": "bfloat16",
                },
            ),
            "train": sections.train(
                num_steps=200000,
                batch_size=4,
                batch_per_device=True,
                images_per_subject=1,
                encode_batch_size=2,
                dtype="bfloat16",
                remat="full",
                min_snr_gamma=5.0,
                checkpoint_every_steps=1000,
                ema_decay=0.999,
                optimizer={"learning_rate": 1e-4, "warmup_steps": 2000},
            ),
            "generate": sections.generate(),
            "evaluate": sections.evaluate(
                num_captions=4,
                num_sampling_steps=25,
                guidance=7.5,
                identities_per_batch=1,
                conventional={
                    "num_identities": 8,
                    "num_validation": 4,
                    "num_slots": 4,
                    "recipe": {"num_steps": 800, "images_per_step": 1},
                },
            ),
            "mesh": sections.mesh(),
        }
    )
