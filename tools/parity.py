"""Models of true size, JAX against PyTorch: one forward pass of every component in float32.

    python tools/parity.py sd15 sd21 sdxl --json docs/measurements/parity.json

Random weights (tools/random_model.py), latents of 32×32, prompts through the pipeline's own
`encode_prompt`. SDXL needs 11 GB on disk and as much free memory.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from hyperlora_jax.stable_diffusion import pytorch_parity

TOOLS = Path(__file__).resolve().parent
FAMILIES = ("sd15", "sd21", "sdxl")


def measure(family: str, parts: tuple[str, ...], seed: int = 0) -> list[dict]:
    """Rows {"model", "output", "relative_error", "max_abs", "ok", "seconds"}."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / family
        command = [sys.executable, str(TOOLS / "random_model.py"), family, str(root), str(seed)]
        subprocess.run(command, check=True)
        began = time.perf_counter()
        for found in pytorch_parity.compare(root, parts=parts):
            row = {"model": family, **dataclasses.asdict(found), "ok": found.ok}
            rows.append({**row, "seconds": round(time.perf_counter() - began, 1)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """0 when every output agrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="+", choices=FAMILIES)
    parser.add_argument("--parts", nargs="+", choices=pytorch_parity.PARTS)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    given = parser.parse_args(arguments)
    parts = tuple(given.parts or pytorch_parity.PARTS)
    rows = [row for family in given.families for row in measure(family, parts)]
    if given.json:
        packages = ("jax", "torch", "diffusers", "transformers")
        record = {
            "tolerance": pytorch_parity.TOLERANCE,
            "latents": "32x32, batch 2",
            "versions": {name: version(name) for name in packages},
            "machine": platform.machine(),
            "rows": rows,
        }
        Path(given.json).parent.mkdir(parents=True, exist_ok=True)
        Path(given.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
