"""Does stable-diffusion.cpp see in our LoRA file what we mean by it? A whole SD 1.5, random.

    python tools/sdcpp_client.py --work /tmp/sdcpp --json docs/measurements/sdcpp.json

Builds an environment with the `cyllama` wheel (stable-diffusion.cpp on the CPU), a random
full-size Stable Diffusion 1.5 in float16, a LoRA on every layer that kohya files carry (278 of the
UNet, 72 of the text encoder), and the same LoRA merged by `merge_into_checkpoint`. It compares
images of one prompt and seed with the merged checkpoint's: base + our file, and what must differ:
the base alone, our file with alpha 1, our file without its text encoder part.
Needs 9 GB of disk, 5 GB of memory and some minutes; all but the environment is removed.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from hyperlora_jax.array_types import Params
from hyperlora_jax.lora.factors import is_site
from hyperlora_jax.lora.sites import LoraSpec, tree_from_sites
from hyperlora_jax.lora_files import safetensors_io, save_lora
from hyperlora_jax.lora_files.algebra import merge_into_checkpoint
from hyperlora_jax.lora_files.base_files import read_base_model
from hyperlora_jax.lora_files.compatibility import EDGE

CLIENT = "cyllama==0.2.18"
RENDER = Path(__file__).with_name("sdcpp_render.py")
PREFIXES = {"unet": "unet.", "text_encoder": "te.", "vae": "vae."}
RANK = 4


def environment(folder: Path) -> Path:
    """Python of an environment with the client; built once."""
    python = folder / "bin" / "python"
    ready = python.exists() and not subprocess.run([python, "-c", "import cyllama"]).returncode
    if not ready:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", CLIENT], check=True)
    return python


def write_base(folder: Path, seed: int = 0) -> None:
    """Random Stable Diffusion 1.5 in diffusers layout, float16, drawn tensor by tensor."""
    random = np.random.default_rng(seed)
    for name, (config, shapes) in architectures().items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))

        def draw(key: str, shapes: dict[str, tuple[int, ...]] = shapes) -> np.ndarray:
            shape = shapes[key]
            numbers = random.standard_normal(shape, np.float32)
            if len(shape) == 1:
                numbers = (key.endswith("weight") and "norm" in key) + 0.02 * numbers
            else:
                numbers *= 1 if "embedding" in key else np.prod(shape[1:]) ** -0.5
            return numbers.astype(np.float16)

        like = {key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()}
        safetensors_io.write_streamed(
            folder / name / "diffusion_pytorch_model.safetensors", like, draw, {"format": "pt"}
        )


def architectures() -> dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]]:
    """{folder: (config, {tensor: shape})} of Stable Diffusion 1.5."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        text = CLIPTextModel(CLIPTextConfig(num_attention_heads=12, vocab_size=49408, **sizes))
    result = {}
    for name, module in (("unet", unet), ("text_encoder", text), ("vae", vae)):
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        if name == "text_encoder":
            # As all published checkpoints name them.
            shapes = {
                key if key.startswith("text_model.") else f"text_model.{key}": shape
                for key, shape in shapes.items()
            }
        result[name] = (json.loads(module.config.to_json_string()) if name == "text_encoder"
                        else dict(module.config), shapes)  # fmt: skip
    return result


def single_file(folder: Path, out: Path) -> None:
    """All models of a directory as one file, as stable-diffusion.cpp takes it."""
    tensors = {}
    for name, prefix in PREFIXES.items():
        file = folder / name / "diffusion_pytorch_model.safetensors"
        tensors |= {prefix + key: array for key, array in safetensors_io.read(file)[0].items()}
    safetensors_io.write_streamed(out, tensors, tensors.__getitem__, {})


def strong_lora(base: Path) -> tuple[Params, LoraSpec]:
    """Changes of about a third of the weights' own size on every layer that a file carries."""
    layers = read_base_model(base).layers.values()
    carried = LoraSpec(tuple(site for site in layers if not EDGE.match(site.path)))
    spec, random = carried.with_rank(RANK), np.random.default_rng(1)
    pairs = {}
    for site in spec.sites:
        down = random.standard_normal(site.down_shape, np.float32) * site.fan_in**-0.5
        up = random.standard_normal(site.up_shape, np.float32) * (0.3 / RANK**0.5)
        pairs[site.path] = {"down": down, "up": up}
    return tree_from_sites(pairs), spec


def controls(lora: Path, folder: Path) -> dict[str, Path]:
    """Files that mean something else: alpha 1 instead of the rank, and the UNet's part only."""
    tensors, texts = safetensors_io.read(lora)
    wrong = {key: np.float32(1) if key.endswith(".alpha") else a for key, a in tensors.items()}
    part = {key: array for key, array in tensors.items() if key.startswith("lora_unet")}
    files = {}
    for name, content in (("alpha 1", wrong), ("no text encoder", part)):
        files[name] = folder / f"{name.replace(' ', '_')}.safetensors"
        safetensors_io.write(files[name], content, texts)
    return files


def compare(work: Path, python: Path, size: int, steps: int) -> dict[str, Any]:
    """Renders everything; what the record holds."""
    base, merged = work / "base", work / "merged"
    write_base(base)
    lora, spec = strong_lora(base)
    file = save_lora(work / "lora.safetensors", lora, spec, "kohya", "float16", "sd1")
    # Merged from the rounded factors: the comparison is about the client, not about float16.
    rounded = jax.tree.map(
        lambda pair: {side: a.astype(np.float16).astype(np.float32) for side, a in pair.items()},
        lora,
        is_leaf=is_site,
    )
    merge_into_checkpoint(base, (rounded, spec), merged)
    for folder in (base, merged):
        single_file(folder, work / f"{folder.name}.safetensors")
        shutil.rmtree(folder)
    cases = {"merged": None, "our file": file, "base": None, **controls(file, work)}
    images, applied, seconds = {}, {}, {}
    for name, given in cases.items():
        model = work / ("merged.safetensors" if name == "merged" else "base.safetensors")
        out = work / f"{name.replace(' ', '_')}.ppm"
        command = [python, RENDER, model, out, size, steps, *([given] if given else [])]
        start = time.perf_counter()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        seconds[name] = round(time.perf_counter() - start, 1)
        images[name] = np.asarray(Image.open(out), np.int16)
        log = json.loads(done.stdout.splitlines()[-1])["log"]
        applied[name] = re.findall(r"\((\d+) / (\d+)\) LoRA tensors", "\n".join(log))
    return {
        "client": f"stable-diffusion.cpp ({CLIENT})",
        "base": f"random Stable Diffusion 1.5, float16, {size}×{size}, {steps} Euler steps",
        "lora": f"{len(spec)} layers, rank {RANK}, kohya, float16",
        "tensors_applied": [list(map(int, pair)) for pair in applied["our file"]],
        "levels_of_255_from_merged": {
            name: {
                "max": int(np.abs(image - images["merged"]).max()),
                "mean": round(float(np.abs(image - images["merged"]).mean()), 3),
            }
            for name, image in images.items()
            if name != "merged"
        },
        "image_spread": round(float(images["merged"].std()), 1),
        "seconds": seconds,
        "machine": f"{len(os.sched_getaffinity(0))} cores {platform.machine()}",
    }


def main() -> int:
    """Parses, compares, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, type=Path, help="new folder for models and images")
    parser.add_argument("--environment", type=Path, help="of the client; default WORK/environment")
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    python = environment(given.environment or given.work / "environment")
    models = given.work / "models"
    shutil.rmtree(models, ignore_errors=True)
    models.mkdir()
    record = compare(models, python, given.size, given.steps)
    shutil.rmtree(models)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    print(text, end="")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
