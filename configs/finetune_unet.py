"""Full fine-tuning of a base model's UNet on pictures with captions, or training it from scratch.

    hyperlora pretrain --config configs/finetune_unet.py --workdir runs/unet \
        --config.base=stable-diffusion-v1-5/stable-diffusion-v1-5 --config.data.source=PICTURES
    hyperlora compile  --config configs/finetune_unet.py --topology v5e-256 \
        --config.base=configs/bases/sd15 --config.data.size=512 --config.train.dtype=bfloat16

As it stands it goes on with the embedded base on drawn avatars. Parameters, their average and the
optimiser are float32 and spread over the `fsdp` axis; `train.dtype` is that of the arithmetic.
Latents and text states are computed once and kept; the autoencoder and text encoders stay as they
are. WORKDIR/base (or `export.path`) is a diffusers folder.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "unet",
            "base": "tiny-sd",
            "data": {
                "source": "avatars",  # or a folder with one sub-folder of pictures per subject
                "style": "pixel-art",
                "size": config_dict.placeholder(int),  # pixels; None: the style's own
                "split_seed": 0,
                "num_identities": 2048,
                "num_views": 8,
                "skip_damaged": False,  # leave out subjects of files that cannot be read
            },
            "train": {
                "seed": 0,
                "from_scratch": False,  # True: new weights, the base's architecture
                "num_steps": 2000,
                "batch_size": 64,
                "batch_per_device": False,  # True: per device, as pods want it
                "encode_batch_size": 256,
                "dtype": "float32",
                "remat": "none",
                "caption_dropout": 0.1,
                "min_snr_gamma": config_dict.placeholder(float),
                "ema_decay": 0.999,
                "log_every_steps": 25,
                "checkpoint_every_steps": 500,
                "keep": 2,  # newest checkpoints
                "keep_best": 1,  # and those of the lowest mean loss
                "trackers": (),  # of "tensorboard", "wandb", "trackio"
                "profile_steps": (),  # (first, last) of a profile in WORKDIR/profile
                "stall_timeout_seconds": 1800,
                "optimizer": {
                    "name": "adamw",  # or muon
                    "learning_rate": 1e-4,
                    "schedule": "cosine",
                    "warmup_steps": 100,
                    "weight_decay": 0.01,
                    "clip_norm": 1.0,
                },
            },
            "export": {
                "path": "",  # empty = WORKDIR/base
                "into_package": False,  # True: the shipped one may be replaced
                "dtype": "float16",
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        }
    )
