"""Speed of a LoRA training step through the UNet, against PyTorch diffusers with peft.

    python tools/bench.py unet [--device cpu|gpu|v5e] --json docs/measurements/unet.json

`run(device)` returns rows {"workload", "ours", "peer", "unit", "ratio", "runs", "machine"}. Both
sides run in turns on one machine; the numbers are medians, ratio > 1 means that we are faster. On a
CPU, ours runs as `hyperlora train` does: one JAX device for each core, the batch split over them.
"""

import os
from typing import Any

from bench_unet_steps import SD15, TINY, jax_step, timed_row, torch_step


def run(device: str) -> list[dict[str, Any]]:
    """Rows of all workloads of "cpu", "gpu" or, by compilation alone, "v5e"."""
    if device == "gpu":
        from bench_unet_gpu import sd15_gpu

        return sd15_gpu()
    if device == "v5e":
        from bench_unet_v5e import sd15_v5e

        return sd15_v5e()
    from hyperlora_jax.parallel import cpu_devices

    cpu_devices.prepare()
    return [
        tiny_cpu(64),
        tiny_cpu(4),
        sd15_cpu(),
        sd15_cpu(forward=True),
        per_example(),
        in_parts(),
    ]


def tiny_cpu(batch: int, runs: int = 15) -> dict[str, Any]:
    """LoRA step of the 1.1 M-parameter UNet, one shared LoRA of rank 4 on both sides."""
    theirs, name = _torch_on_all_cores(TINY, batch, 16, 4)
    ours = jax_step(TINY, batch, 16, 4, None)
    return timed_row(f"unet/tiny/batch{batch}/cpu", ours, theirs, runs, "ms/step", name)


def sd15_cpu(runs: int = 5, forward: bool = False) -> dict[str, Any]:
    """LoRA step of a random SD 1.5 UNet, or its forward pass, one picture of 256²; needs 16 GB."""
    config = {**SD15, "sample_size": 32}
    theirs, name = _torch_on_all_cores(config, 1, 77, 8, forward)
    ours = jax_step(config, 1, 77, 8, None, forward=forward)
    title = "unet/sd15/batch1/cpu" + (" forward" if forward else "")
    return timed_row(title, ours, theirs, runs, "s/step", name)


def per_example(runs: int = 15) -> dict[str, Any]:
    """16 LoRAs of rank 8 for 16 examples against one LoRA for all; ratio = shared / per example."""
    config = {**TINY, "block_out_channels": [128, 256], "norm_num_groups": 32}
    shared = jax_step(config, 16, 16, 8, None)
    many = jax_step(config, 16, 16, 8, 16)
    return timed_row("lora/per-example/r8x16", many, shared, runs, "ms/step", "one shared LoRA")


def in_parts(runs: int = 15) -> dict[str, Any]:
    """16 LoRAs for 4 pictures each, a few pictures at a time against all at once."""
    from hyperlora_jax.stable_diffusion import denoising_loss

    parts = jax_step(TINY, 64, 16, 4, 16)
    parts()
    whole = jax_step(TINY, 64, 16, 4, 16)
    kept, denoising_loss.NUMBERS_AT_ONCE = denoising_loss.NUMBERS_AT_ONCE, 0
    whole()  # compiles
    denoising_loss.NUMBERS_AT_ONCE = kept
    return timed_row("lora/in-parts/r4x16", parts, whole, runs, "ms/step", "all at once")


def _torch_on_all_cores(
    config: dict, batch: int, tokens: int, rank: int, forward: bool = False
) -> tuple[Any, str]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    return torch_step(config, batch, tokens, rank, "cpu", False, forward)
