"""The LoRA training step that the `unet` benchmarks time: ours, PyTorch's, and how they take turns.

Where diffusers or peft is not installed the peer is a plain PyTorch UNet of the same layers
(tools/bench_torch_unet.py), which `peer_name` says.
"""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

SHORT, BURST = 0.5, 5  # seconds; steps in a turn
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


def jax_step(
    config: dict,
    batch: int,
    tokens: int,
    rank: int,
    num_loras: int | None,
    dtype: Any = None,
    forward: bool = False,
    **unet_options: Any,
) -> Callable[[], None]:
    """A jitted LoRA gradient step on random weights, as a function that runs and waits; or the
    forward pass of its loss alone.

    The batch is split over all devices, as `hyperlora train` does; one LoRA for all (num_loras =
    None) is on every device, LoRAs of their own are where their examples are.
    """
    import jax
    import jax.numpy as jnp

    from hyperlora_jax.diffusion.schedule import NoiseSchedule
    from hyperlora_jax.lora import factors, sites
    from hyperlora_jax.parallel import sharding
    from hyperlora_jax.parallel.mesh import make_mesh
    from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser, lora_losses
    from hyperlora_jax.stable_diffusion.networks import convolutions
    from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
    from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params

    dtype = dtype or jnp.float32
    mesh = make_mesh() if batch % jax.device_count() == 0 else make_mesh(devices=jax.devices()[:1])
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    unet = unet_from_config(config, dtype).clone(mesh=mesh, **unet_options)

    @functools.partial(jax.jit, out_shardings=whole)
    def weights(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), init_params(unet, key))

    params = weights(jax.random.key(0))
    frozen = convolutions.frozen(params)
    spec = sites.spec_from_shapes(params, "attn-qkvo", rank)
    loras = num_loras or 1
    per_lora = whole if num_loras is None else rows
    lora = jax.device_put(factors.init(jax.random.key(1), spec, loras), per_lora)
    size, channels = config["sample_size"], config["in_channels"]
    latents = jax.random.normal(jax.random.key(2), (batch, size, size, channels))
    text = jax.random.normal(jax.random.key(3), (batch, tokens, config["cross_attention_dim"]))
    inputs = jax.device_put((latents, jnp.arange(batch) * 999 // batch, text), rows)
    denoiser = Denoiser(unet, NoiseSchedule())
    even = jnp.full(batch // loras, loras / batch)

    @functools.partial(
        jax.jit,
        in_shardings=(per_lora, whole, rows, rows, rows),
        out_shardings=whole if forward else per_lora,
    )
    def step(lora, params, latents, times, text):
        def loss(lora):
            pictures = latents, {"states": text}, times, jnp.ones_like(latents)
            pictures = jax.tree.map(lambda x: x.reshape(loras, -1, *x.shape[1:]), pictures)
            return lora_losses(denoiser, params, lora, pictures, even)[0].mean()

        return loss(lora) if forward else jax.grad(loss)(lora)

    return lambda: jax.block_until_ready(step(lora, frozen, *inputs))


def torch_step(
    config: dict,
    batch: int,
    tokens: int,
    rank: int,
    device: str,
    compiled: bool,
    forward: bool = False,
) -> tuple[Callable[[], None], str]:
    """The same in PyTorch with one shared LoRA, and the name of what ran."""
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
        with torch.set_grad_enabled(not forward):
            out = model(latents, times, text)
        out = out if isinstance(out, torch.Tensor) else out.sample
        if not forward:
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


def interleaved(steps: Sequence[Callable[[], None]], runs: int) -> list[list[float]]:
    """Seconds of every step, turn by turn; the steps take turns, after two warm-up rounds.

    A turn of a short step is `BURST` of them, as in training, and counts their median; the first is
    left out: OpenMP's threads spin for a while after PyTorch's turn, and take cores from ours.
    """
    times: list[list[float]] = [[] for _ in steps]
    for round_index in range(runs + 2):
        for step, seconds in zip(steps, times, strict=True):
            took = [_seconds(step)]
            if took[0] < SHORT:
                took = [_seconds(step) for _ in range(BURST)]
            if round_index >= 2:
                seconds.append(statistics.median(took))
    return times


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def timed_row(
    workload: str,
    ours: Callable[[], None],
    peer: Callable[[], None],
    runs: int,
    unit: str,
    peer_name: str,
) -> dict[str, Any]:
    """The row of two steps that took turns: median times, median of the pairs' ratios."""
    mine, theirs = interleaved([ours, peer], runs)
    scale = 1e3 if unit == "ms/step" else 1.0
    return {
        **row(
            workload,
            scale * statistics.median(mine),
            scale * statistics.median(theirs),
            unit,
            statistics.median(b / a for a, b in zip(mine, theirs, strict=True)),
        ),
        "runs": runs,
        "machine": machine(),
        "peer_name": peer_name,
    }


def row(workload: str, ours: float, peer: float, unit: str, ratio: float) -> dict[str, Any]:
    """The first columns of a row, four digits each."""
    values = {"ours": ours, "peer": peer, "unit": unit, "ratio": ratio}
    return {"workload": workload, **{name: _rounded(value) for name, value in values.items()}}


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


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
