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

from hyperlora_jax.stable_diffusion.weights.families import FAMILIES

WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
SHARD_BYTES = 1 << 30


def write_random_model(family: str, root: Path, seed: int = 0) -> None:
    """UNet, autoencoder, text encoders and tokenizers of a family."""
    for index, (name, config) in enumerate(FAMILIES[WIDTHS[family]].items()):
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
