"""Attribute probe of the avatar world: judges whether a picture shows its caption.

    hyperlora pretrain --config configs/avatar_probe.py --workdir runs/avatar_probe

Writes WORKDIR/probe (about 1.5 MB), or `export.path`.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "avatar_probe",
            "data": {
                "style": "pixel-art",
                "size": config_dict.placeholder(int),  # pixels; None: the style's own
                "split_seed": 0,
                "num_identities": 4096,
                "num_views": 8,
                "bundle": "",  # an .npz file of pictures drawn before; empty = draw them
            },
            "model": {
                "encoder": {
                    "widths": (16, 64, 128),
                    "blocks": 1,
                    "embedding_dim": 256,
                    "pool_channels": 16,
                },
            },
            "train": {
                "seed": 0,
                "num_steps": 1500,
                "batch_size": 128,
                "log_every_steps": 50,
                "checkpoint_every_steps": 500,
                "ema_decay": 0.999,
                "optimizer": {
                    "name": "adamw",  # or muon
                    "learning_rate": 1e-3,
                    "schedule": "cosine",
                    "warmup_steps": 100,
                    "weight_decay": 0.01,
                    "clip_norm": 1.0,
                },
                "augmentation": {"noise": 0.08, "blur": 1.0, "colour": 0.06},
            },
            "export": {
                "path": "",  # empty = WORKDIR/probe
                "name": "avatar-probe",
                "into_package": False,  # True: the shipped one may be replaced
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
