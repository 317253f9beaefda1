"""Sections of a config with all their keys and ordinary values; a config file names what differs.

    "train": sections.train(num_steps=2000, optimizer={"learning_rate": 1e-4}),

A section in a section is merged into what stands here, but those of `WHOLE`, which are keyword
arguments of something, replace it.
"""

from collections.abc import Mapping

from ml_collections import config_dict

from hyperlora_jax.array_types import Json

WHOLE = ("network", "recipe", "judges", "others")
EXTRA = ("prior", "components_per_token", "b1", "b2", "final_fraction")  # absent unless named


def data(**changes: object) -> Json:
    """`data`: a folder of pictures per subject."""
    section = {
        "source": "",  # a folder with one sub-folder of pictures per subject
        "size": config_dict.placeholder(int),  # pixels; None: the base's own
        "split_seed": 0,
        "num_identities": config_dict.placeholder(int),  # first by name; None: all but a fifth
        "targets": "",  # LoRA-target datasets, "A,B"; empty = WORKDIR/targets
        "target_weights": (),  # how often each one's subjects are drawn; () = all alike
        "gauge": "raw",  # of its LoRAs: raw, svd or procrustes
        "num_targets": 0,  # how many of its LoRAs to learn from; 0 = all
        "skip_damaged": False,  # leave out LoRAs of files that cannot be read
    }
    return merged(section, changes)


def world(**changes: object) -> Json:
    """`data`: drawn subjects with exact answers, of which any number can be made."""
    section = {
        **data(source="avatars", num_identities=2048),
        "style": "pixel-art",  # or heads, fonts, or another style of the avatars
        "num_views": 8,  # pictures of everybody
    }
    return merged(section, changes)


def distill(**changes: object) -> Json:
    """`distill`: conventional LoRAs, many at once."""
    section = {
        "num_concepts": config_dict.placeholder(int),  # subjects; None: who is trained on
        "num_steps": 200,  # of each LoRA
        "preset": config_dict.placeholder(str),  # None: as model.preset
        "rank": config_dict.placeholder(int),  # None: as model.rank
        "seed": 0,
        "num_slots": 16,  # LoRAs at a time
        "steps_per_call": 25,
        "save_every_steps": 200,
        "dtype": "float32",  # of the frozen base; factors are float32 always
        "remat": "none",  # none, block, save_attention or full: less memory, more time
        "encode_batch_size": 256,  # pictures that the autoencoder sees at once
        "buckets": False,  # True: folders' pictures are cut to the shape nearest to theirs
        "flips": False,  # True: mirrored pictures too
        "encoders": (),  # whose embeddings of the references are kept too
        "prompt": "",  # for all pictures; empty = their captions
        "splits": "train",  # all, as the held-out subjects are others; hash: by identity
        "recipe": {"images_per_step": 4, "learning_rate": 1e-2, "schedule": "constant"},
    }
    return merged(section, changes)


def model(**changes: object) -> Json:
    """`model`: what sees the references, what a LoRA is, what writes it."""
    section = {
        "encoder": "avatar",  # or a CLIP folder, a transformers folder, an .onnx file
        # Of such an encoder, where they are not what its folder says: see docs/hypernetworks.md.
        "encoder_options": {"mean": (), "std": (), "image_size": ()},
        "preset": "attn-qkvo",  # the layers of a LoRA: w2w, attn-qkvo, attn-ff, all
        "rank": 4,
        "generator": "regression",  # see hypernet/building.py
        "condition_dropout": 0.0,
        "num_iterations": 4,  # of iterative regression
        "network": {
            "width": 128,
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 4,
            "conditioning": "adanorm",  # or adalora
            "head": "per_token",  # dense, per_token, basis or orthogonal
            "down": "generated",  # or learned: one for all subjects
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
    }
    return merged(section, changes)


def train(**changes: object) -> Json:
    """`train`: the hypernetwork."""
    section = {
        "seed": 0,
        "num_steps": config_dict.placeholder(int),  # None: by how many subjects there are
        "batch_size": config_dict.placeholder(int),  # subjects a step; None: by how many there are
        "batch_per_device": False,  # True: per device, as pods want it
        "images_per_subject": 4,  # a step; a subject with fewer repeats its own
        "num_references": (1, 1),  # fewest and most pictures that a subject is told by
        "encode_batch_size": 256,  # pictures that the autoencoder sees at once
        "dtype": "float32",  # of the frozen base; the hypernetwork's: model.network.dtype
        "remat": "none",  # of UNet and backbone: none, block, save_attention or full
        "min_snr_gamma": config_dict.placeholder(float),
        "objectives": {  # weights; see train/hypernetwork/objectives.py
            "end_to_end": 1.0,  # draws the subject's pictures through the frozen base
            "delta": 0.0,  # these need LoRA targets:
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
            "batch_size": 32,  # as batch_size above
            "kl_weight": 0.1,
            "ema_decay": config_dict.placeholder(float),
            "log_every_steps": 50,
            "checkpoint_every_steps": 500,
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4,
                "schedule": "linear",
                "b1": 0.9,
                "b2": 0.98,
                "weight_decay": 1e-2,
                "clip_norm": 1.0,
            },
        },
        "ema_decay": 0.998,  # of the averaged parameters; None: no average
        "log_every_steps": 25,
        "checkpoint_every_steps": 200,
        "keep": 2,  # newest checkpoints
        "keep_best": 1,  # and those of the lowest mean loss
        "trackers": (),  # of "tensorboard", "wandb", "trackio"
        "profile_steps": (),  # (first, last) of a profile in WORKDIR/profile
        "stall_timeout_seconds": 1800,
        "optimizer": {
            "name": "adamw",  # or muon
            "learning_rate": 1e-4,
            "schedule": "cosine",  # cosine, linear or constant, after the warm-up
            "warmup_steps": 50,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
        },
    }
    return merged(section, changes)


def generate(**changes: object) -> Json:
    """`generate`: kept with the checkpoint, read by `hyperlora generate`."""
    section = {
        "format": "kohya",  # kohya, diffusers, peft or weights2weights
        "num_samples": 1,
        "guidance": 1.0,
        "num_steps": 25,  # of a diffusion generator
        "sampler": "ddim",  # or ancestral
    }
    return merged(section, changes)


def evaluate(**changes: object) -> Json:
    """`evaluate`: the comparison on held-out subjects."""
    section = {
        "source": "",  # pictures to evaluate on; empty = data.source
        "prompts": (),  # for a folder of pictures; empty = the pictures' own captions
        "probe": "",  # judges captions of drawn subjects; empty = the shipped one, for pixel-art
        "judges": {"independent": ""},  # name: an encoder (docs/evaluation.md)
        "detector": "",  # module:function; a picture without one subject scores 0
        "clip": "",  # a CLIP folder, for prompt fidelity
        "lpips": "",  # weights made by tools/convert_lpips.py
        "identity_seed": 0,
        "num_identities": 64,
        "num_validation": 16,  # on whom strengths are chosen
        "num_captions": 8,
        "num_views": 8,
        "num_candidates": 32,
        "num_sampling_steps": 20,
        "guidance": 1.0,
        "identities_per_batch": 16,
        "strengths": (0.75, 1.0, 1.5, 2.0, 3.0),
        "guidances": (1.0, 2.0, 3.0),  # of generators that know what guidance is
        "methods": (  # see evaluate/method_loras.py
            "base", "mean_lora", "nearest", "shuffled", "generated", "refined_25", "conventional",
        ),
        "others": {"paper": ""},  # more methods: a name and the workdir of a `train`
        "refine": {"rank": 4, "recipe": {"images_per_step": 8}},
        "linear_combination": {
            "per": "factor",  # global, site or factor
            "recipe": {"num_steps": 400, "images_per_step": 4, "learning_rate": 1e-2},
        },
        "steps_to_quality": {  # fits of so many test identities; 0: none
            "num_identities": 0,
            "checkpoints": (0, 5, 10, 25, 50, 100, 200, 300),
        },
        "conventional": {
            "num_identities": 64,
            "num_validation": 16,
            "num_slots": 40,
            "recipe": {"num_steps": 300, "images_per_step": 8, "schedule": "cosine"},
        },
    }  # fmt: skip
    return merged(section, changes)


def mesh(**changes: object) -> Json:
    """`mesh`, of training; distill and evaluate share LoRAs out over all devices of all hosts."""
    section = {
        "data": -1,  # -1: what the others leave
        "fsdp": 1,
        "tensor": 1,
    }
    return merged(section, changes)


def merged(section: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """A section with some values changed.

    Raises:
        TypeError: a key that it does not have.
    """
    joined = dict(section)
    for key, value in changes.items():
        if key not in joined and key not in EXTRA:
            raise TypeError(f"no key {key!r} among {', '.join(joined)}")
        old = joined.get(key)
        within = isinstance(old, dict) and isinstance(value, Mapping) and key not in WHOLE
        joined[key] = merged(old, value) if within else value  # type: ignore[arg-type]
    return joined
