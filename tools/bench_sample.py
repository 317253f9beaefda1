"""Pictures from prompts, whole pipelines: `StableDiffusion.sample` against diffusers with peft.

    python tools/bench.py sample --json docs/measurements/sample_cpu.json

Two rows, the same noise and weights on both sides, float32, guidance 7.5, the base's own sampler.
64 pictures of the embedded tiny base with a LoRA each in 20 steps: diffusers draws one person after
another, by `set_adapters` or by hot swapping, whichever is faster here. And one picture of 256² in
2 steps of a base of Stable Diffusion 1.5's size with random weights; needs 16 GB. Nothing is timed
unless the pictures are equal to 1e-3 of the range.
"""

import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_serve import GUIDANCE, PROMPT, Draw, by_hotswap, by_jax, by_set_adapters, lora_files
from bench_unet_steps import interleaved, machine, row
from random_model import write_random_model

PEOPLE, RUNS = 64, 3
SIDE, STEPS = 256, 2  # of the large base
MOST = 1e-3  # that a pixel in [0, 1] may differ


def run(device: str) -> list[dict[str, Any]]:
    """Both rows; a CPU only."""
    if device != "cpu":
        raise SystemExit(f"bench.py sample: --device {device} is not there, expected cpu")
    from hyperlora_jax.parallel import cpu_devices

    cpu_devices.prepare()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = lora_files(Path(folder), PEOPLE)
        peers = {"set_adapters": by_set_adapters(files), "hotswap": by_hotswap(files)}
        fastest = min(peers, key=lambda name: _seconds(peers[name]))
        title = f"sample/tiny/{PEOPLE} LoRAs"
        tiny = _row(title, by_jax(files), peers[fastest], PEOPLE, f"diffusers + peft, {fastest}")
        base = _large(Path(folder) / "base")
        large = _row(f"sample/sd15/{SIDE}", _one_by_jax(base), _one(base), 1, "diffusers")
    return [tiny, large]


def _seconds(draw: Draw) -> float:
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start


def _row(title: str, ours: Draw, peer: Draw, count: int, name: str) -> dict[str, Any]:
    difference = float(np.abs(ours() - peer()).max())
    if difference > MOST:
        raise SystemExit(f"{title}: pictures differ by {difference:.1e}, expected {MOST} at most")
    mine, theirs = interleaved([ours, peer], RUNS)
    ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    rates = (count / statistics.median(times) for times in (mine, theirs))
    return {
        **row(title, *rates, "pictures/s", ratio),
        "runs": RUNS,
        "machine": machine(),
        "peer_name": name,
        "pixel_difference": difference,
    }


def _large(folder: Path) -> Path:
    """A random base of Stable Diffusion 1.5's size, with the sampler of the tiny one."""
    from hyperlora_jax.shipped import base_path

    write_random_model("sd15", folder)
    small = Path(base_path("tiny-sd"))
    shutil.copy(small / "model_index.json", folder)
    shutil.copytree(small / "scheduler", folder / "scheduler")
    return folder


def _noise() -> np.ndarray:
    shape = (1, SIDE // 8, SIDE // 8, 4)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _one(base: Path) -> Draw:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(_noise()).permute(0, 3, 1, 2)
    return lambda: pipe(
        PROMPT, height=SIDE, width=SIDE, latents=latents, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, output_type="np",
    ).images  # fmt: skip


def _one_by_jax(base: Path) -> Draw:
    from hyperlora_jax.stable_diffusion.embedded import load_base

    sd, latents = load_base(str(base)), _noise()
    return lambda: np.asarray(
        sd.sample(0, [PROMPT], num_steps=STEPS, guidance=GUIDANCE, latents=latents)
    )
