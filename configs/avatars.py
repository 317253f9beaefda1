"""The avatar world on the embedded tiny base: distil, train, evaluate.

hyperlora distill  --config configs/avatars.py --workdir runs/avatars
hyperlora train    --config configs/avatars.py --workdir runs/avatars
hyperlora evaluate --config configs/avatars.py --workdir runs/avatars
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "base": "tiny-sd",
            "data": {
                "source": "avatars",  # or a folder with one sub-folder of pictures per subject
                "style": "pixel-art",
                "size": 16,
                "split_seed": 0,
                "num_identities": 2048,
                "num_views": 8,
                "targets": "",  # a LoRA-target dataset; empty = WORKDIR/targets
            },
            "distill": {
                "num_concepts": 256,
                "num_steps": 200,
                "preset": "attn-qkvo",
                "rank": 4,
                "seed": 0,
                "num_slots": 16,
                "steps_per_call": 25,
                "save_every_steps": 200,
                "recipe": {"images_per_step": 4, "learning_rate": 1e-2},
            },
            "model": {
                "encoder": "avatar",
                "preset": "attn-qkvo",
                "rank": 4,
                "network": {
                    "width": 128,
                    "depth": 2,
                    "num_heads": 4,
                    "mlp_ratio": 4,
                    "conditioning": "adanorm",
                    "head": "per_token",
                    "down": "generated",
                    "up_scale": 0.3,
                },
            },
            "train": {
                "seed": 0,
                "num_steps": 6000,
                "batch_size": 16,  # subjects per device
                "batch_per_device": True,
                "images_per_subject": 4,
                "num_references": 1,
                "encode_batch_size": 256,
                "min_snr_gamma": config_dict.placeholder(float),
                "objectives": {"end_to_end": 1.0},
                "ema_decay": 0.998,
                "log_every_steps": 25,
                "checkpoint_every_steps": 200,
                "optimizer": {
                    "learning_rate": 2e-3,
                    "schedule": "cosine",
                    "warmup_steps": 50,
                    "weight_decay": 0.0,
                    "clip_norm": 1.0,
                },
            },
            "generate": {"format": "kohya", "num_samples": 1},
            "evaluate": {
                "identity_seed": 0,
                "num_identities": 64,
                "num_validation": 16,
                "num_captions": 8,
                "num_views": 8,
                "num_candidates": 32,
                "num_sampling_steps": 20,
                "guidance": 1.0,
                "identities_per_batch": 16,
                "strengths": (0.75, 1.0, 1.5, 2.0),
                "conventional": {
                    "num_identities": 32,
                    "num_validation": 8,
                    "num_slots": 20,
                    "recipe": {"images_per_step": 8},
                },
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
