"""A hypernetwork of 1 B parameters on weights2weights tokens (Stable Diffusion 1.5, q and v at
rank 1: 128 tokens, 99,648 numbers), learned in weight space from LoRAs.

    hyperlora compile  --config configs/w2w_1b.py --topology v5e-16 --effort low
    hyperlora distill  --config configs/w2w_1b.py --workdir gs://BUCKET/w2w \
        --config.base=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --config.model.encoder=ENCODER --config.data.source=FACES
    hyperlora train    --config configs/w2w_1b.py --workdir gs://BUCKET/w2w
    hyperlora evaluate --workdir gs://BUCKET/w2w --config.evaluate.judges.independent=JUDGE

`distill` fits the LoRAs by the weights2weights recipe (configs/distill_w2w.py tells more); instead,
`--config.data.targets=LORAS` names what `hyperlora import` made of published ones. `compile` needs
no weights: configs/bases/sd15 holds nothing but the base's config.json files. FACES is a folder of
pictures per subject, ENCODER and JUDGE are condition encoders (docs/hypernetworks.md).
"""

import pathlib

from ml_collections import ConfigDict

from hyperlora_jax.cli import sections

BASES = pathlib.Path(__file__).parent / "bases"
PERSON = "a photo of sks person"


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "base": str(BASES / "sd15"),
            "data": sections.data(size=512),
            "distill": sections.distill(
                num_steps=800,
                num_slots=32,
                save_every_steps=100,
                dtype="bfloat16",
                remat="block",
                encode_batch_size=8,
                prompt=PERSON,
                prior={
                    "prompts": ("a photo of a person",),
                    "num_images": 200,
                    "batch_size": 8,
                    "num_steps": 30,
                    "guidance": 7.5,
                },
                recipe={
                    "images_per_step": 1,
                    "learning_rate": 1e-4,
                    "schedule": "constant",
                    "b2": 0.999,
                    "weight_decay": 1e-2,
                    "alpha": 27.0,
                    "prior_weight": 1.0,
                    "init_seed": 0,
                },
            ),
            "model": sections.model(
                encoder="",  # no default: the shipped ones know drawings only
                preset="w2w",
                rank=1,
                network={
                    "width": 1536,
                    "depth": 18,
                    "num_heads": 16,
                    "mlp_ratio": 4,
                    "conditioning": "adanorm",
                    "head": "dense",
                    "scan": True,
                    "remat": True,
                    "dtype": "bfloat16",
                },
            ),
            "train": sections.train(
                num_steps=100000,
                batch_size=32,
                batch_per_device=True,
                images_per_subject=1,
                encode_batch_size=8,
                objectives={"end_to_end": 0.0, "delta": 0.1, "whitened": 1.0},
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
                    "recipe": {"num_steps": 800, "images_per_step": 1, "prior_weight": 0.0},
                },
            ),
            # 16 chips hold it easily; parameters are gathered among neighbours, gradients summed
            # over all.
            "mesh": sections.mesh(fsdp=16),
        }
    )
