"""A base of true size with LoRA inputs: seconds, peak memory, bytes on disk, distance from peft.

    python tools/export_true_size.py sd15 --json docs/measurements/lora_inputs.json

The UNet has random weights (tools/random_model.py). `hyperlora export` is a process of its own. Two
rows with two LoRAs are drawn by the exported graph and by diffusers with peft, latents of
32×32: the largest difference relative to the largest output.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from random_model import FAMILIES, write_random_model

PRESET, RANK = "attn-qkvo", 4


def export(base: Path, out: Path, format: str, dtype: str) -> dict[str, Any]:
    """What the command took, and what it wrote."""
    command = [sys.executable, "-m", "hyperlora_jax", "export", str(base), "--out", str(out)]
    command += ["--format", format, "--lora", PRESET, "--rank", str(RANK), "--dtype", dtype]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "bytes": {file.name: file.stat().st_size for file in sorted(out.iterdir())},
    }


def distance(base: Path, out: Path, files: list[Path]) -> dict[str, Any]:
    """Rows through the graph and through peft, one model in memory at a time."""
    import torch

    from hyperlora_jax.runtime.lora_unet import LoraUNet

    config = json.loads((base / "unet" / "config.json").read_text())
    random = torch.Generator().manual_seed(0)
    rows = {
        "sample": torch.randn(2, config["in_channels"], 32, 32, generator=random),
        "timestep": torch.tensor([17.0, 801.0]),
        "encoder_hidden_states": torch.randn(
            2, 77, config["cross_attention_dim"], generator=random
        ),
    }
    unet = LoraUNet(out)
    loras = torch.stack([unet.vector(file) for file in files])
    began = time.perf_counter()
    ours = unet(loras, torch.tensor([1.0, 0.5]), **rows).float()
    seconds = time.perf_counter() - began
    numbers = unet.layout["numbers"]
    del unet
    theirs = _by_peft(base, files, rows)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    return {"numbers": numbers, "forward_seconds": round(seconds, 1), "relative_error": error}


def _by_peft(base: Path, files: list[Path], rows: dict[str, Any]) -> Any:
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32).eval()
    for k, file in enumerate(files):
        unet.load_lora_adapter(load_file(file), prefix="unet", adapter_name=f"own{k}")
    found = []
    for k, strength in enumerate((1.0, 0.5)):
        unet.set_adapters([f"own{k}"], [strength])
        with torch.no_grad():
            one = {name: value[k : k + 1] for name, value in rows.items()}
            found.append(unet(**one, return_dict=False)[0])
    return torch.cat(found)


def lora_files(base: Path, folder: Path) -> list[Path]:
    """Two LoRAs of normal numbers."""
    import jax

    from hyperlora_jax.lora import factors
    from hyperlora_jax.lora_files import save_lora
    from hyperlora_jax.stable_diffusion.model import StableDiffusion

    spec = StableDiffusion.outline(base, ("unet",)).lora_spec(PRESET, RANK)
    files = []
    for k in range(2):
        leaves, tree = jax.tree.flatten(factors.zeros(spec))
        rng = np.random.default_rng(k)
        drawn = [0.02 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
        file = folder / f"{k}.safetensors"
        files.append(save_lora(file, tree.unflatten(drawn), spec, "diffusers", "float32"))
    return files


def main(arguments: list[str] | None = None) -> int:
    """0 when the graph draws what peft draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=("sd15", "sd21"))
    parser.add_argument("--format", nargs="+", default=["onnx"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / given.family
        FAMILIES[given.family] = {"unet": FAMILIES[given.family]["unet"]}
        write_random_model(given.family, base)
        files = lora_files(base, Path(folder))
        for format in given.format:
            out = Path(folder) / format
            row = {"base": given.family, "format": format, "dtype": given.dtype}
            row |= {"lora": PRESET, "rank": RANK, **export(base, out, format, given.dtype)}
            rows.append(row | distance(base, out, files))
            print(json.dumps(rows[-1]), flush=True)
    packages = ("torch", "diffusers", "peft", "onnxruntime", "onnxscript")
    record = {"versions": {name: version(name) for name in packages}, "rows": rows}
    given.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["relative_error"] <= 1e-4 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
