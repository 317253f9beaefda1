"""Identity encoder of the avatar world, trained on training identities only.

    hyperlora pretrain --config configs/avatar_encoder.py --workdir runs/avatar_encoder

Writes WORKDIR/encoder (about 1.5 MB), or `export.path`.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "avatar_encoder",
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
                "projection_dim": 128,
                "decoder_width": 64,
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
                "weights": {
                    "contrast": 1.0,
                    "picture": 20.0,
                    "parts": 0.5,
                    "temperature": 0.1,
                    "noise": 0.03,
                },
            },
            "export": {
                "path": "",  # empty = WORKDIR/encoder
                "name": "avatar-encoder",
                "into_package": False,  # True: the shipped one may be replaced
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
