"""Many people at once: one batch on a base with LoRA inputs, against diffusers swapping adapters.

    python tools/bench.py serve --json docs/measurements/serve_cpu.json

Eight people with a LoRA each (q, k, v and out, rank 4) are drawn on the embedded tiny base: whole
pictures from prompt to pixels, 20 steps, guidance 7.5, the base's own sampler. Ours draws all eight
in one batch, by the exported ONNX graph, by the exported PyTorch program, or in JAX. The peer is
diffusers with peft, one person after another: all adapters in memory and `set_adapters`, or
`load_lora_weights(hotswap=True)` of each file; every row names the faster of both in its round.
A row also says how far a pixel differs from the peer's at most, of 1.
"""

import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_unet_steps import interleaved, machine, row

from hyperlora_jax.shipped import base_path

BASE, PRESET, RANK = "tiny-sd", "attn-qkvo", 4
PEOPLE, STEPS, GUIDANCE, RUNS = 8, 20, 7.5, 9
PROMPT = "a portrait"
Draw = Callable[[], np.ndarray]  # pictures [PEOPLE, h, w, 3] in [0, 1]


def run(device: str) -> list[dict[str, Any]]:
    """Rows of the two exported forms and of JAX; a CPU only."""
    if device != "cpu":
        raise SystemExit(f"bench.py serve: --device {device} is not there, expected cpu")
    from hyperlora_jax.parallel import cpu_devices

    cpu_devices.prepare()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = lora_files(Path(folder), PEOPLE)
        peers = {"set_adapters": by_set_adapters(files), "hotswap": by_hotswap(files)}
        ours = {
            "onnx": _by_graph(files, Path(folder), "onnx"),
            "torch-export": _by_graph(files, Path(folder), "torch-export"),
            "jax": by_jax(files),
        }
        draws = peers | ours
        pictures = {name: draw() for name, draw in draws.items()}
        times = interleaved(list(draws.values()), RUNS)
    seconds = dict(zip(draws, times, strict=True))
    fastest = [min(pair) for pair in zip(*(seconds[name] for name in peers), strict=True)]
    medians = {name: statistics.median(seconds[name]) for name in draws}
    return [
        {
            **row(
                f"serve/{name}/{PEOPLE} people",
                PEOPLE / medians[name],
                PEOPLE / statistics.median(fastest),
                "pictures/s",
                statistics.median(b / a for a, b in zip(seconds[name], fastest, strict=True)),
            ),
            "runs": RUNS,
            "machine": machine(),
            "peer_name": f"diffusers + peft, {min(peers, key=medians.__getitem__)}",
            "peers": {peer: round(PEOPLE / medians[peer], 3) for peer in peers},
            "pixel_difference": float(np.abs(pictures[name] - pictures["set_adapters"]).max()),
        }
        for name in ours
    ]


def lora_files(folder: Path, count: int) -> list[Path]:
    """So many LoRAs of the base, random ones, as files."""
    import jax

    from hyperlora_jax.lora import factors
    from hyperlora_jax.lora_files import save_lora
    from hyperlora_jax.stable_diffusion.model import StableDiffusion

    spec = StableDiffusion.outline(base_path(BASE)).lora_spec(PRESET, RANK)
    files = []
    for k in range(count):
        leaves, tree = jax.tree.flatten(factors.zeros(spec))
        rng = np.random.default_rng(k)
        drawn = [0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
        file = folder / f"{k}.safetensors"
        files.append(save_lora(file, tree.unflatten(drawn), spec, "diffusers", "float32"))
    return files


def _pipeline() -> Any:
    from diffusers import DiffusionPipeline

    # float32 by name: a text encoder would come in the float16 of its file, the UNet would not.
    pipe = DiffusionPipeline.from_pretrained(base_path(BASE), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _noise(pipe: Any, count: int) -> torch.Tensor:
    shape = (count, pipe.unet.config.in_channels, *2 * [pipe.unet.config.sample_size])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _draw(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    return pipe(
        [PROMPT] * len(latents),
        latents=latents,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
    ).images


def by_set_adapters(files: list[Path]) -> Draw:
    """diffusers, all adapters in memory, a picture of each in turn."""
    pipe = _pipeline()
    for k, file in enumerate(files):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"own{k}")
    noise = _noise(pipe, len(files))

    def draw() -> np.ndarray:
        pictures = []
        for k in range(len(files)):
            pipe.set_adapters([f"own{k}"])
            pictures.append(_draw(pipe, noise[k : k + 1]))
        return np.concatenate(pictures)

    return draw


def by_hotswap(files: list[Path]) -> Draw:
    """diffusers, each file loaded over the one before."""
    pipe = _pipeline()
    one: dict[str, Any] = {"adapter_name": "one"}
    pipe.load_lora_weights(files[0].parent, weight_name=files[0].name, **one)
    noise = _noise(pipe, len(files))

    def draw() -> np.ndarray:
        pictures = []
        for k, file in enumerate(files):
            pipe.load_lora_weights(file.parent, weight_name=file.name, hotswap=True, **one)
            pictures.append(_draw(pipe, noise[k : k + 1]))
        return np.concatenate(pictures)

    return draw


def _by_graph(files: list[Path], folder: Path, format: Any) -> Draw:
    from hyperlora_jax.runtime.base_export import export_base
    from hyperlora_jax.runtime.lora_unet import LoraUNet

    export_base(base_path(BASE), folder / format, format, PRESET, RANK)
    unet, pipe = LoraUNet(folder / format), _pipeline()
    unet.attach(pipe, [unet.vector(file) for file in files])
    noise = _noise(pipe, len(files))
    return lambda: _draw(pipe, noise)


def by_jax(files: list[Path]) -> Draw:
    """`StableDiffusion.sample`, all in one batch."""
    from hyperlora_jax.parallel.mesh import make_mesh
    from hyperlora_jax.parallel.sharding import REPLICATED_RULES
    from hyperlora_jax.stable_diffusion.embedded import load_base
    from hyperlora_jax.stable_diffusion.networks.lora_argument import lora_tree

    sd = load_base(BASE, mesh=make_mesh(), rules=REPLICATED_RULES)
    loras = lora_tree(list(files), sd)
    latents = _noise(_pipeline(), len(files)).permute(0, 2, 3, 1).numpy()
    prompts = [PROMPT] * len(files)

    def draw() -> np.ndarray:
        return np.asarray(
            sd.sample(0, prompts, loras, num_steps=STEPS, guidance=GUIDANCE, latents=latents)
        )

    return draw
