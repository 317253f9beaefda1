"""The avatar world on the embedded tiny base: distil, train, evaluate.

hyperlora distill  --config configs/avatars.py --workdir runs/avatars
hyperlora train    --config configs/avatars.py --workdir runs/avatars
hyperlora evaluate --config configs/avatars.py --workdir runs/avatars

On one of two CPU cores training took 67 minutes beside other work; the conventional LoRAs of all 14
methods are what an evaluation waits for. Identity top-1 of 32 on 64 held-out identities: generated
.91, refined for 25 steps .96, conventional .93 (docs/results.md).
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "base": "tiny-sd",
            "data": {
                "source": "avatars",  # or a folder with one sub-folder of pictures per subject
                "style": "pixel-art",
                "size": config_dict.placeholder(int),  # pixels; None: the style's own
                "split_seed": 0,
                "num_identities": 2048,
                "num_views": 8,
                "targets": "",  # LoRA-target datasets, "A,B"; empty = WORKDIR/targets
                "target_weights": (),  # how often each one's subjects are drawn; () = all alike
                "gauge": "raw",  # of its LoRAs: raw, svd or procrustes
                "num_targets": 0,  # how many of its LoRAs to learn from; 0 = all
                "skip_damaged": False,  # leave out LoRAs of files that cannot be read
            },
            "distill": {
                "num_concepts": 256,
                "num_steps": 200,
                "preset": config_dict.placeholder(str),  # of the LoRAs; None: model.preset
                "rank": config_dict.placeholder(int),  # None: model.rank
                "seed": 0,
                "num_slots": 16,
                "steps_per_call": 25,
                "save_every_steps": 200,
                "dtype": "float32",  # of the frozen base; factors are float32 always
                "remat": "none",
                "encode_batch_size": 256,  # pictures that the autoencoder sees at once
                "buckets": False,  # True: folders' pictures are cut to the shape nearest to theirs
                "flips": False,
                "encoders": ("avatar",),  # whose embeddings of the references are kept too
                "prompt": "",  # for all pictures; empty = their captions
                "splits": "train",  # all; the held-out avatars are others
                "recipe": {"images_per_step": 4, "learning_rate": 1e-2, "schedule": "constant"},
            },
            "model": {
                "encoder": "avatar",
                "preset": "attn-qkvo",
                "rank": 4,
                "generator": "regression",  # see hypernet/building.py
                "condition_dropout": 0.0,
                "num_iterations": 4,  # of iterative regression
                "network": {
                    "width": 128,
                    "depth": 2,
                    "num_heads": 4,
                    "mlp_ratio": 4,
                    "conditioning": "adanorm",
                    "head": "per_token",
                    "down": "generated",
                    "up_scale": 0.3,
                    "scan": False,  # blocks as one loop: compiles in the time of one of them
                    "dtype": "float32",  # or bfloat16; parameters stay float32
                },
                "diffusion": {
                    "prediction": "x0",  # x0, v or flow
                    "num_train_timesteps": 1000,
                    "denoiser": "tokens",  # tokens (section network) or mlp (section mlp)
                },
                "mlp": {
                    "width": 1024,
                    "num_stages": 4,
                    "blocks_per_stage": 3,
                    "conditioning": "adanorm",
                    "adapter_rank": 8,
                },
                "vae": {"latent_dim": 512, "width": 512, "depth": 20, "expansion": 3},
                "baseline": {
                    "space": "raw",  # raw factors, or delta
                    "num_neighbours": 20,
                    "temperature": 0.1,
                    "kernel_width": 0.5,
                    "num_components": 128,
                },
            },
            "train": {
                "seed": 0,
                "num_steps": 6000,
                "batch_size": 16,  # subjects a step, shared out over all devices
                "batch_per_device": False,  # True: per device, as pods want it
                "images_per_subject": 4,  # a step; a subject with fewer repeats its own
                "num_references": (1, 1),  # fewest and most pictures that a subject is told by
                "encode_batch_size": 256,
                "dtype": "float32",  # of the frozen base; the hypernetwork's: model.network.dtype
                "remat": "none",  # of UNet and backbone: none, block, save_attention or full
                "min_snr_gamma": config_dict.placeholder(float),
                "objectives": {
                    "end_to_end": 1.0,
                    "delta": 0.0,
                    "whitened": 0.0,
                    "diffusion": 0.0,
                    "prior": 0.0,
                    "l2": 0.0,
                },
                "warm_up": {"num_steps": 0, "objectives": {"delta": 1.0}},  # before `objectives`
                "prior_caption": "",
                "vae": {  # first stage of latent_diffusion
                    "workdir": "",  # to share one between runs; empty = WORKDIR/vae
                    "num_steps": 2000,
                    "batch_size": 32,
                    "kl_weight": 0.1,
                    "ema_decay": config_dict.placeholder(float),
                    "log_every_steps": 50,
                    "checkpoint_every_steps": 500,
                    "optimizer": {
                        "learning_rate": 1e-4,
                        "schedule": "linear",
                        "b1": 0.9,
                        "b2": 0.98,
                        "weight_decay": 1e-2,
                        "clip_norm": 1.0,
                    },
                },
                "ema_decay": 0.998,
                "log_every_steps": 25,
                "checkpoint_every_steps": 200,
                "keep": 2,  # newest checkpoints
                "keep_best": 1,  # and those of the lowest mean loss
                "tensorboard": False,
                "profile_steps": (),  # (first, last) of a profile in WORKDIR/profile
                "stall_timeout_seconds": 1800,
                "optimizer": {
                    "learning_rate": 2e-3,
                    "schedule": "cosine",
                    "warmup_steps": 50,
                    "weight_decay": 0.0,
                    "clip_norm": 1.0,
                },
            },
            "generate": {  # kept with the checkpoint, read by `hyperlora generate`
                "format": "kohya",
                "num_samples": 1,
                "guidance": 1.0,
                "num_steps": 25,  # of a diffusion generator
                "sampler": "ddim",
            },
            "evaluate": {
                "source": "",  # pictures to evaluate on; empty = data.source
                "prompts": (),  # for a folder of pictures; empty = the pictures' own captions
                "probe": "",  # judges captions; empty = the shipped one, for pixel-art
                "judges": {"independent": ""},  # name: an encoder (docs/evaluation.md)
                "detector": "",  # module:function; a picture without one subject scores 0
                "clip": "",  # a CLIP folder, for prompt fidelity
                "lpips": "",  # weights made by tools/convert_lpips.py
                "identity_seed": 0,
                "num_identities": 64,
                "num_validation": 16,
                "num_captions": 8,
                "num_views": 8,
                "num_candidates": 32,
                "num_sampling_steps": 20,
                "guidance": 1.0,
                "identities_per_batch": 16,
                "strengths": (0.75, 1.0, 1.5, 2.0, 3.0),
                "guidances": (1.0, 2.0, 3.0),  # of generators that know what guidance is
                "methods": (  # see evaluate/lora_sources.py
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
                "others": {"paper": ""},  # more methods: a name and the workdir of a `train`
                "refine": {"rank": 4, "recipe": {"images_per_step": 8}},
                "linear_combination": {
                    "per": "factor",  # global, site or factor
                    "recipe": {"num_steps": 400, "images_per_step": 4, "learning_rate": 1e-2},
                },
                "steps_to_quality": {  # fits of so many test identities; 0: none
                    "num_identities": 16,
                    "checkpoints": (0, 5, 10, 25, 50, 100, 200, 300),
                },
                "conventional": {
                    "num_identities": 64,
                    "num_validation": 16,
                    "num_slots": 40,
                    "recipe": {"num_steps": 300, "images_per_step": 8, "schedule": "cosine"},
                },
            },
            # Of training; distill and evaluate share LoRAs out over all devices of all hosts.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
