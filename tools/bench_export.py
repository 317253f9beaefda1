"""How fast LoRA files are written, read and converted, against PEFT and diffusers.

    python tools/bench.py export --json docs/measurements/export.json

w2w: 64 layers of SD 1.5 at rank 1 (99,648 numbers); r8: q, k, v, out at rank 8 (1.6 M numbers).
Every write includes fsync. Reading is to a checked, folded LoRA in float32, ready to use; PEFT is
ready to use after `PeftModel.from_pretrained` (here on a model whose other weights are on the meta
device and cost nothing); its `load_peft_weights` alone gives mapped, unchecked, unscaled tensors.
A peer of null means that no other tool writes that form from factors alone.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.lora.factors import is_site, zeros
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora, save_lora
from hyperlora_jax.lora_files.writing import FORMATS

COUNT = {"w2w": 40, "r8": 15}
RUNS = 5


def run(device: str = "cpu", runs: int = RUNS) -> list[dict]:
    """All rows. File work happens on the host whatever the device is."""
    del device
    rows = []
    for name, spec in (
        ("w2w", attention_spec(("to_q", "to_v"), 1)),
        ("r8", attention_spec(_ALL, 8)),
    ):
        lora = _random(spec)
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            rows += _rows(name, spec, lora, Path(folder), COUNT[name], runs)
    return rows


_ALL = ("to_q", "to_k", "to_v", "to_out.0")


def _rows(
    name: str, spec: LoraSpec, lora: Params, folder: Path, count: int, runs: int
) -> list[dict]:
    rows = []
    for format in FORMATS:
        paths = [folder / f"{format}{i}" for i in range(count)]
        rates = [_rate(lambda p, f=format: save_lora(p, lora, spec, f), paths) for _ in range(runs)]
        rows.append(_row(f"write {name} {format}", rates, None))
        files = [path if format in ("peft", "weights2weights") else _file(path) for path in paths]
        ours = [_rate(load_lora, files) for _ in range(runs)]
        rows.append(_row(f"read {name} {format}", ours, None))
        if format == "peft":
            model = _torch_model(spec)
            ready = [_rate_peft(model, paths[:5]) for _ in range(runs)]
            rows[-1] = _row(f"read {name} {format}, ready to use", ours, ready)
            mapped = [_rate(_peft_map, paths) for _ in range(runs)]
            rows.append(_row(f"read {name} {format}, peer only maps the file", ours, mapped))
    return rows


def _file(path: Path) -> Path:
    return path / "pytorch_lora_weights.safetensors" if path.is_dir() else path


def _peft_map(path: Path) -> object:
    from peft.utils.save_and_load import load_peft_weights

    return load_peft_weights(str(path), device="cpu")


def _peft_load(model: Any, path: Path) -> object:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(path), low_cpu_mem_usage=True).unload()


def _torch_model(spec: LoraSpec) -> Any:
    """A module tree with the spec's layers, on the meta device."""
    import torch

    root = torch.nn.Module()
    for site in spec.sites:
        *parents, leaf = site.path.split(".")
        node = root
        for name in parents:
            if not hasattr(node, name):
                node.add_module(name, torch.nn.Module())
            node = getattr(node, name)
        node.add_module(leaf, torch.nn.Linear(site.in_features, site.out_features, device="meta"))
    return root


def _rate(work: Callable[[Path], object], paths: list[Path]) -> float:
    """Files per second with a thread for each core, as `convert` works on folders."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(work, paths))
    return len(paths) / (time.perf_counter() - start)


def _rate_peft(model: Any, paths: list[Path]) -> float:
    """PEFT puts adapters into one model, so one after the other."""
    start = time.perf_counter()
    for path in paths:
        _peft_load(model, path)
    return len(paths) / (time.perf_counter() - start)


def _row(workload: str, ours: list[float], peer: list[float] | None) -> dict:
    rate = statistics.median(ours)
    other = statistics.median(peer) if peer else None
    return {
        "workload": workload,
        "ours": round(rate, 1),
        "peer": round(other, 1) if other else None,
        "unit": "files/s",
        "ratio": round(rate / other, 2) if other else None,
        "runs": len(ours),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
    }


def attention_spec(projections: tuple[str, ...], rank: int) -> LoraSpec:
    """Attention layers of Stable Diffusion 1.5's UNet."""
    blocks = [
        (f"{side}_blocks.{level}.attentions.{k}", width)
        for side, levels, layers in (("down", (0, 1, 2), 2), ("up", (1, 2, 3), 3))
        for level, width in zip(levels, _widths(side), strict=True)
        for k in range(layers)
    ]
    sites = []
    for path, width in [*blocks, ("mid_block.attentions.0", 1280)]:
        for kind in ("attn1", "attn2"):
            for projection in projections:
                inputs = 768 if kind == "attn2" and projection in ("to_k", "to_v") else width
                layer = f"{path}.transformer_blocks.0.{kind}.{projection}"
                sites.append(LoraSite(layer, inputs, width, rank))
    return LoraSpec(tuple(sites))


def _widths(side: str) -> tuple[int, ...]:
    return (320, 640, 1280) if side == "down" else (1280, 640, 320)


def _random(spec: LoraSpec) -> Params:
    random = np.random.default_rng(0)

    def fill(pair: Params) -> Params:
        return {
            side: (0.01 * random.standard_normal(leaf.shape)).astype(np.float32)
            for side, leaf in pair.items()
        }

    return jax.tree.map(fill, zeros(spec), is_leaf=is_site)


if __name__ == "__main__":
    for line in run():
        print(line)
