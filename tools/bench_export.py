"""How fast LoRA files are written, read and converted, against PEFT and diffusers.

    python tools/bench.py export --json docs/measurements/export_cpu.json

w2w: 64 layers of SD 1.5 at rank 1 (99,648 numbers); r8: q, k, v, out at rank 8 (1.6 M numbers).
Writing is `save_loras`, which `generate --subjects` uses, of as many different LoRAs as files,
fsync of every file included. Reading is `load_lora`: checked, folded, float32. Its peer is PEFT's
way to usable weights, `PeftModel.from_pretrained`, here on a model whose other weights are on the
meta device and cost nothing. In the rows "bare file" it is PEFT's `load_peft_weights` alone, which
maps the tensors as they are: it converts, scales and hashes nothing and looks for no NaN.
A peer of null: no other tool writes that form from factors alone, or reads it into a model.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.lora.factors import is_site, zeros
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora, save_loras
from hyperlora_jax.lora_files.writing import FORMATS

COUNT = {"w2w": 100, "r8": 30}
READY = 5
RUNS = 5


def run(device: str = "cpu", runs: int = RUNS) -> list[dict]:
    """All rows. File work happens on the host whatever the device is."""
    del device
    rows = []
    for name, spec in (
        ("w2w", attention_spec(("to_q", "to_v"), 1)),
        ("r8", attention_spec(_ALL, 8)),
    ):
        loras = _random(spec, COUNT[name])
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            rows += _rows(name, spec, loras, Path(folder), runs)
    return rows


FOLDERS = ("peft", "weights2weights")
_ALL = ("to_q", "to_k", "to_v", "to_out.0")


def _rows(name: str, spec: LoraSpec, loras: Params, folder: Path, runs: int) -> list[dict]:
    rows = []
    for format in FORMATS:
        suffix = "" if format in FOLDERS else ".safetensors"
        paths = [folder / f"{format}{i}{suffix}" for i in range(COUNT[name])]
        rates = []
        for _ in range(runs):
            start = time.perf_counter()
            save_loras(paths, loras, spec, format)
            rates.append(len(paths) / (time.perf_counter() - start))
        rows.append(_row(f"write {name} {format}", rates, None))
        files = [path if format in FOLDERS else _file(path) for path in paths]
        for what, peer in (_peers(spec, paths) if format == "peft" else {"": None}).items():
            pairs = [(_rate(load_lora, files), peer and peer()) for _ in range(runs)]
            ours, theirs = zip(*pairs, strict=True)
            rows.append(_row(f"read {name} {format}{what}", ours, theirs if peer else None))
    return rows


def _peers(spec: LoraSpec, paths: list[Path]) -> dict[str, Callable[[], float]]:
    """PEFT's readers of adapter directories, in files per second."""
    model = _torch_model(spec)
    return {
        ", into a model": lambda: _rate_peft(model, paths[:READY]),
        ", bare file": lambda: _rate(_peft_map, paths),
    }


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


def _row(workload: str, ours: Sequence[float], peer: Sequence[float] | None) -> dict:
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


def _random(spec: LoraSpec, num_loras: int) -> Params:
    random = np.random.default_rng(0)

    def fill(pair: Params) -> Params:
        return {
            side: np.float32(0.01) * random.standard_normal(leaf.shape, np.float32)
            for side, leaf in pair.items()
        }

    return jax.tree.map(fill, zeros(spec, num_loras), is_leaf=is_site)


if __name__ == "__main__":
    for line in run():
        print(line)
