"""A model of true size with random weights: a diffusers directory, every tensor drawn from a seed.

    python tools/random_model.py sd15|sd21|sdxl FOLDER [SEED]

Names and shapes are PyTorch's own (modules on the meta device). Tensors are written in shards, one
shard in memory at a time. Kernels have standard deviation 1/sqrt(fan-in), so that activations keep
their size; norms are drawn around 1, biases around 0.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

_ATTENTION_DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
_ATTENTION_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "eos_token_id": 2,
}
_OPEN_CLIP_H = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "eos_token_id": 2,
}
_OPEN_CLIP_G = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "eos_token_id": 2,
}
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": _ATTENTION_DOWN,
    "up_block_types": _ATTENTION_UP,
    "layers_per_block": 2,
}
_UNET_XL = {
    **_UNET,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768},
        "vae": _VAE,
        "text_encoder": _CLIP_L,
    },
    "sd21": {
        "unet": {
            **_UNET,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "cross_attention_dim": 1024,
        },
        "vae": _VAE,
        "text_encoder": _OPEN_CLIP_H,
    },
    "sdxl": {
        "unet": _UNET_XL,
        "vae": {**_VAE, "scaling_factor": 0.13025, "sample_size": 1024},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_G,
    },
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
SHARD_BYTES = 1 << 30


def write_random_model(family: str, root: Path, seed: int = 0) -> None:
    """UNet, autoencoder, text encoders and tokenizers of a family."""
    for index, (name, config) in enumerate(FAMILIES[family].items()):
        module = _meta_module(name, config)
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        _write(folder, STEMS.get(name, "model"), shapes, np.random.default_rng((seed, index)))
        if name.startswith("text_encoder"):
            _write_tokenizer(root / name.replace("text_encoder", "tokenizer"))


def _meta_module(name: str, config: dict[str, Any]) -> Any:
    import torch
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        if name == "unet":
            return UNet2DConditionModel.from_config(config)
        if name == "vae":
            return AutoencoderKL.from_config(config)
        kind = getattr(transformers, config["architectures"][0])
        return kind(transformers.CLIPTextConfig(**config))


def _write(folder: Path, stem: str, shapes: dict, rng: np.random.Generator) -> None:
    shards = list(_shards(shapes))
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"{stem}-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: _draw(name, shapes[name], rng) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    size = sum(4 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 4 * math.prod(shape) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 4 * math.prod(shape)
    yield names


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(shape, np.float32)
    if "embedding" in name and "time" not in name and "add" not in name:
        return noise
    if len(shape) > 1:
        return noise / np.float32(math.sqrt(math.prod(shape[1:])))
    is_scale = "norm" in name and name.endswith("weight")
    return np.float32(is_scale) + np.float32(0.2) * noise


def _write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of single letters whose ids are spread over CLIP's whole vocabulary."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    pieces = [chr(c) for c in range(33, 127)]
    pieces += [f"{piece}</w>" for piece in pieces]
    vocabulary = {piece: 7 + 262 * i for i, piece in enumerate(pieces)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    CLIPTokenizer(*files, model_max_length=77).save_pretrained(str(folder))


if __name__ == "__main__":
    write_random_model(sys.argv[1], Path(sys.argv[2]), int((sys.argv[3:] or [0])[0]))
