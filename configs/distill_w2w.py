"""The weights2weights recipe: one rank-1 LoRA per person on Stable Diffusion 1.5.

hyperlora distill --config configs/distill_w2w.py --workdir runs/w2w \
    --config.data.source=PEOPLE --config.distill.num_concepts=1000

PEOPLE has a folder of pictures per person. Rank 1 with alpha 27 on q and v of every attention layer
(99,648 numbers), 800 steps at 1e-4, one picture and one class picture ("person") a step, the same
initialisation for everybody, so that members differ by what their pictures taught.
2,571 TFLOP a LoRA: `hyperlora compile` says how many slots fit a device.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "base": "SG161222/Realistic_Vision_V5.1_noVAE",  # what the published set was made on
            "data": {"source": "", "size": 512},
            "distill": {
                "num_concepts": 1000,
                "num_steps": 800,
                "preset": "w2w",
                "rank": 1,
                "seed": 0,
                "num_slots": 32,
                "steps_per_call": 25,
                "save_every_steps": 100,
                "dtype": "bfloat16",
                "remat": "block",
                "encode_batch_size": 8,  # pictures that the autoencoder sees at once
                "buckets": False,  # True: folders' pictures are cut to the shape nearest to theirs
                "flips": False,
                "encoders": (),  # e.g. a face encoder's .onnx: its embeddings are kept too
                "prompt": "a photo of sks person",
                "splits": "hash",  # train, validation, test by identity
                "prior": {
                    "prompts": ("a photo of a person",),
                    "num_images": 200,
                    "batch_size": 8,
                    "num_steps": 30,
                    "guidance": 7.5,
                },
                "recipe": {
                    "images_per_step": 1,
                    "learning_rate": 1e-4,
                    "b2": 0.999,
                    "weight_decay": 1e-2,
                    "alpha": 27.0,
                    "prior_weight": 1.0,
                    "init_seed": 0,
                },
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
