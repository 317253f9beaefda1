"""Speed of a LoRA training step through the UNet, against PyTorch diffusers with peft.

    python tools/bench.py unet [--device cpu|gpu|v5e] --json docs/measurements/unet.json

`run(device)` returns rows {"workload", "ours", "peer", "unit", "ratio", "runs", "machine"}. Both
sides run in turns on one machine; the numbers are medians, ratio > 1 means that we are
faster. Where diffusers or peft is not installed the peer is a plain PyTorch UNet of the same layers
(tools/bench_torch_unet.py), which `peer` says.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

TINY = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
}
SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_STEP_TFLOP = 1.61  # per 512² image: forward, and backward to the activations only
H100_BF16_TFLOPS = 989.0
MAXDIFFUSION_V5E = 4  # images per chip: 12.69 GiB of temporaries and 1.61 GiB of weights


def run(device: str) -> list[dict[str, Any]]:
    """Rows of all workloads of "cpu", "gpu" or, by compilation alone, "v5e"."""
    if device == "gpu":
        return sd15_gpu()
    if device == "v5e":
        return [sd15_v5e(remat) for remat in ("none", "save_attention")]
    rows = [tiny_cpu(batch) for batch in (64, 4)]
    return [*rows, sd15_cpu(), per_example()]


def jax_step(
    config: dict, batch: int, tokens: int, rank: int, num_loras: int | None, **unet_options: Any
) -> Callable[[], None]:
    """A jitted LoRA gradient step on random weights, as a function that runs and waits."""
    import jax
    import jax.numpy as jnp

    from hyperlora_jax.lora import factors, sites
    from hyperlora_jax.stable_diffusion.checkpoint import init_params
    from hyperlora_jax.stable_diffusion.unet import unet_from_config

    dtype = unet_options.pop("dtype", jnp.float32)
    unet = unet_from_config(config, dtype).clone(**unet_options)
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), init_params(unet, key)))(
        jax.random.key(0)
    )
    spec = sites.spec_from_shapes(params, "attn-qkvo", rank)
    lora = factors.init(jax.random.key(1), spec, num_loras)
    size, channels = config["sample_size"], config["in_channels"]
    latents = jax.random.normal(jax.random.key(2), (batch, size, size, channels))
    text = jax.random.normal(jax.random.key(3), (batch, tokens, config["cross_attention_dim"]))
    times = jnp.linspace(0, 999, batch)

    @jax.jit
    def step(lora, params, latents, times, text):
        def loss(lora):
            out = unet.apply({"params": params, "lora": lora}, latents, times, text)
            return jnp.square(out.astype(jnp.float32)).mean()

        return jax.grad(loss)(lora)

    return lambda: jax.block_until_ready(step(lora, params, latents, times, text))


def torch_step(
    config: dict, batch: int, tokens: int, rank: int, device: str, compiled: bool
) -> tuple[Callable[[], None], str]:
    """The same step in PyTorch with one shared LoRA, and the name of what ran."""
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    unet, name = _torch_unet(config, rank)
    unet = unet.to(device, dtype)
    if device != "cpu":
        unet = unet.to(memory_format=torch.channels_last)
    factors = [p for p in unet.parameters() if p.requires_grad]
    size, channels = config["sample_size"], config["in_channels"]
    latents = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
    text = torch.randn(batch, tokens, config["cross_attention_dim"], device=device, dtype=dtype)
    times = torch.linspace(0, 999, batch, device=device)
    model = torch.compile(unet) if compiled else unet

    def step() -> None:
        out = model(latents, times, text)
        out = out if isinstance(out, torch.Tensor) else out.sample
        torch.autograd.grad(out.float().square().mean(), factors)
        if device != "cpu":
            torch.cuda.synchronize()

    return step, name + (" compiled" if compiled else " eager")


def _torch_unet(config: dict, rank: int) -> tuple[Any, str]:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    try:
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig
    except ImportError:
        from bench_torch_unet import TorchUNet

        return TorchUNet(config, rank), "plain PyTorch"
    unet = UNet2DConditionModel(**config).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    return unet, "diffusers + peft"


def interleaved(steps: list[Callable[[], None]], runs: int) -> list[float]:
    """Median seconds of every step; the steps take turns, after two warm-up rounds."""
    times: list[list[float]] = [[] for _ in steps]
    for round_index in range(runs + 2):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if round_index >= 2:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def _row(workload: str, ours: float, peer: float, unit: str, ratio: float, **rest: Any) -> dict:
    values = {"ours": ours, "peer": peer, "unit": unit, "ratio": ratio}
    return {"workload": workload, **{k: _rounded(v) for k, v in values.items()}, **rest}


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def tiny_cpu(batch: int, runs: int = 15) -> dict[str, Any]:
    """LoRA step of the 1.1 M-parameter UNet, one shared LoRA of rank 4 on both sides."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    theirs, name = torch_step(TINY, batch, 16, 4, "cpu", compiled=False)
    ours = jax_step(TINY, batch, 16, 4, None)
    seconds = interleaved([ours, theirs], runs)
    milliseconds = [1e3 * s for s in seconds]
    return _row(
        f"unet/tiny/batch{batch}/cpu",
        *milliseconds,
        "ms/step",
        seconds[1] / seconds[0],
        runs=runs,
        machine=machine(),
        peer_name=name,
    )


def sd15_cpu(runs: int = 3) -> dict[str, Any]:
    """LoRA step of a random SD 1.5 UNet, one picture of 256²; needs 12 GB. No goal."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    config = {**SD15, "sample_size": 32}
    theirs, name = torch_step(config, 1, 77, 8, "cpu", compiled=False)
    ours = jax_step(config, 1, 77, 8, None)
    seconds = interleaved([ours, theirs], runs)
    return _row(
        "unet/sd15/batch1/cpu",
        *seconds,
        "s/step",
        seconds[1] / seconds[0],
        runs=runs,
        machine=machine(),
        peer_name=name,
    )


def sd15_v5e(remat: str, limit: int = 32) -> dict[str, Any]:
    """Images per chip of a bf16 LoRA step at 512², found by compiling for v5e (15.75 GiB).

    The peer is MaxDiffusion's UNet, whose limit is 4 by the same compiler.
    """
    from hyperlora_jax.train import ahead_of_time, compile_search

    ahead_of_time.prepare_environment()
    from hyperlora_jax.parallel.topology import parse
    from hyperlora_jax.train.lora_workload import lora_workload

    found = compile_search.search([lora_workload(SD15, remat=remat)], parse("v5e:2x2"), limit=limit)
    images = found["batch_per_chip"] if found else 0
    row = _row(
        "unet/sd15/512/v5e",
        images,
        MAXDIFFUSION_V5E,
        "images/chip",
        images / MAXDIFFUSION_V5E,
        runs=1,
        machine="libtpu's compiler, no TPU",
        peer_name="MaxDiffusion UNet",
    )
    return {**row, "remat": remat, "record": found}


def per_example(runs: int = 15) -> dict[str, Any]:
    """16 LoRAs of rank 8 for 16 examples against one LoRA for all; ratio = shared / per example."""
    config = {**TINY, "block_out_channels": [128, 256], "norm_num_groups": 32}
    shared = jax_step(config, 16, 16, 8, None)
    many = jax_step(config, 16, 16, 8, 16)
    seconds = interleaved([many, shared], runs)
    return _row(
        "lora/per-example/r8x16",
        1e3 * seconds[0],
        1e3 * seconds[1],
        "ms/step",
        seconds[1] / seconds[0],
        runs=runs,
        machine=machine(),
        peer_name="one shared LoRA",
    )


def sd15_gpu(batches: tuple[int, ...] = (16, 32), runs: int = 10) -> list[dict[str, Any]]:
    """bf16 LoRA step (rank 8, q k v out, one LoRA an image) of a random SD 1.5 UNet at 512².

    Every part runs in a process of its own, because both frameworks keep the memory they took: ours
    at every batch size, the peers at the best of them, then ours again.
    """
    ours = {batch: _part("jax", batch, runs) for batch in batches}
    done = {batch: found for batch, found in ours.items() if "seconds" in found}
    if not done:
        raise RuntimeError(f"no batch size ran: {ours}")
    batch = max(done, key=lambda b: b / done[b]["seconds"])
    rows = []
    for kind in ("eager", "compiled"):
        peer = _part(kind, batch, runs)
        again = _part("jax", batch, runs)
        ours_seconds = statistics.median([done[batch]["seconds"], again["seconds"]])
        rate = batch / ours_seconds
        theirs = batch / peer["seconds"] if "seconds" in peer else float("nan")
        row = _row(
            "unet/sd15/512/gpu",
            rate,
            theirs,
            "images/s",
            rate / theirs,
            runs=runs,
            machine=again["machine"],
            peer_name=peer.get("name", peer.get("error")),
        )
        rows.append({**row, "batch": batch, "mfu": rate * SD15_STEP_TFLOP / H100_BF16_TFLOPS})
    return rows


def _part(kind: str, batch: int, runs: int) -> dict[str, Any]:
    """{"seconds", "name", "machine"} of one side in its own process, or {"error"}."""
    command = [sys.executable, __file__, "part", kind, str(batch), str(runs)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        return {"error": found.stderr.strip().splitlines()[-1][:300]}
    return json.loads(found.stdout.strip().splitlines()[-1])


def part(kind: str, batch: int, runs: int) -> dict[str, Any]:
    """Times one side of `sd15_gpu` in this process."""
    if kind == "jax":
        import jax.numpy as jnp

        step, name = jax_step(SD15, batch, 77, 8, batch, dtype=jnp.bfloat16), "hyperlora_jax"
        where = machine()
    else:
        import torch

        step, name = torch_step(SD15, batch, 77, 8, "cuda", kind == "compiled")
        where = f"{torch.cuda.get_device_name()}; torch {torch.__version__}"
    return {"seconds": interleaved([step], runs)[0], "name": name, "machine": where}


def machine() -> str:
    """Processor or GPU, and the versions of what ran."""
    import jax

    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else _cpu_name()
    versions = f"jax {jax.__version__}"
    try:
        import torch

        versions += f", torch {torch.__version__}"
    except ImportError:
        versions += ", no torch"
    return f"{kind}; {versions}"


def _cpu_name() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        print(json.dumps(part(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        print(json.dumps(run(sys.argv[1] if len(sys.argv) > 1 else "cpu"), indent=1))
