"""Stable Diffusion 1.5 at 512 pixels: a hypernetwork of 300 M parameters, trained end to end
through the frozen UNet (q, k, v and out of all attention at rank 8: 128 layers, 3.2 M numbers).

    hyperlora compile  --config configs/sd15.py --topology v5e-256 --effort low
    hyperlora distill  --config configs/sd15.py --workdir gs://BUCKET/sd15 \
        --config.base=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --config.model.encoder=ENCODER --config.data.source=FACES
    hyperlora train    --config configs/sd15.py --workdir gs://BUCKET/sd15
    hyperlora evaluate --workdir gs://BUCKET/sd15 --config.evaluate.judges.independent=JUDGE

`compile` needs no weights: configs/bases/sd15 holds nothing but the base's config.json files.
FACES is a folder of pictures per subject, ENCODER and JUDGE are condition encoders
(docs/hypernetworks.md). `distill` may be left out: training needs no LoRAs, the controls of the
evaluation do. Compiled for pods (docs/scaling.md), never trained.
"""

import pathlib

from ml_collections import ConfigDict

from hyperlora_jax.cli import sections

BASES = pathlib.Path(__file__).parent / "bases"


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "base": str(BASES / "sd15"),
            "data": sections.data(size=512),
            "distill": sections.distill(
                num_concepts=256,  # for the controls of the evaluation
                num_steps=1200,
                dtype="bfloat16",
                remat="block",
                encode_batch_size=8,
                recipe={
                    "images_per_step": 2,
                    "accumulate": 2,
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
                batch_size=16,
                batch_per_device=True,
                images_per_subject=1,
                encode_batch_size=8,
                dtype="bfloat16",
                remat="save_attention",
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
                identities_per_batch=2,
                conventional={
                    "num_identities": 16,
                    "num_validation": 8,
                    "num_slots": 16,
                    "recipe": {"num_steps": 800, "images_per_step": 2},
                },
            ),
            "mesh": sections.mesh(),
        }
    )
