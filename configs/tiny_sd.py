"""The embedded base model: a tiny Stable Diffusion of drawn avatars.

    hyperlora pretrain --config configs/tiny_sd.py --workdir runs/tiny_sd

Trains the autoencoder, then the text encoder and the UNet together, and writes a diffusers
directory (float16) to WORKDIR/base, or `export.path`. Captions name the view (mouth, eyes, glasses,
clothes, background), never the identity: who is drawn is what a LoRA has to add.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "base",
            "data": {
                "style": "pixel-art",
                # Pixels. None is the style's own: 16 for pixel-art (its grid), 64 for the others.
                "size": config_dict.placeholder(int),
                "split_seed": 0,
                "num_identities": 4096,
                "num_views": 8,
            },
            "base": {
                "latent_size": 8,
                "autoencoder": {
                    "block_out_channels": (16, 48),  # for 16 pixels; see pretrain/level_widths.py
                    "layers_per_block": 1,
                    "latent_channels": 8,
                    "norm_num_groups": 8,
                    "mid_block_add_attention": False,
                },
                "unet": {
                    "block_out_channels": (32, 64),
                    "layers_per_block": 1,
                    "attention_head_dim": 4,
                    "cross_attention_dim": 64,
                    "norm_num_groups": 8,
                },
                "text_encoder": {
                    "hidden_size": 64,
                    "intermediate_size": 256,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                },
                "model_max_length": 16,
            },
            "autoencoder": {
                "num_steps": 4000,
                "batch_size": 32,
                "kl_weight": 1e-4,
                "l1_weight": 0.05,
                "ema_decay": 0.999,
                "log_every_steps": 100,
                "checkpoint_every_steps": 500,
                "optimizer": {
                    "name": "adamw",  # or muon
                    "learning_rate": 2e-3,
                    "schedule": "cosine",
                    "warmup_steps": 100,
                    "weight_decay": 0.0,
                },
            },
            "train": {
                "seed": 0,
                "num_steps": 3600,
                "batch_size": 64,
                "caption_dropout": 0.1,
                "min_snr_gamma": config_dict.placeholder(float),
                "ema_decay": 0.999,
                "log_every_steps": 100,
                "checkpoint_every_steps": 500,
                "keep": 2,  # newest checkpoints
                "keep_best": 1,  # and those of the lowest mean loss
                "trackers": (),  # of "tensorboard", "wandb", "trackio"
                "profile_steps": (),  # (first, last) of a profile in WORKDIR/profile
                "stall_timeout_seconds": 1800,
                "optimizer": {
                    "name": "adamw",  # or muon
                    "learning_rate": 1e-3,
                    "schedule": "cosine",
                    "warmup_steps": 200,
                    "weight_decay": 0.01,
                },
            },
            "export": {
                "path": "",  # empty = WORKDIR/base
                "into_package": False,  # True: the shipped one may be replaced
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
