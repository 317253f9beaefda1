"""The GPU rows of `tools/bench.py unet`: SD 1.5 at 512² in bf16, a process for every part.

python tools/bench_unet_gpu.py jax|eager|compiled BATCH RUNS     one part, as JSON
"""

import json
import statistics
import subprocess
import sys
from typing import Any

from bench_unet_steps import SD15, interleaved, jax_step, machine, row, torch_step

SD15_STEP_TFLOP = 1.61  # per 512² image: forward, and backward to the activations only
H100_BF16_TFLOPS = 989.0


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
        rows.append(
            {
                **row("unet/sd15/512/gpu", rate, theirs, "images/s", rate / theirs),
                "runs": runs,
                "machine": again["machine"],
                "peer_name": peer.get("name", peer.get("error")),
                "batch": batch,
                "mfu": rate * SD15_STEP_TFLOP / H100_BF16_TFLOPS,
            }
        )
    return rows


def _part(kind: str, batch: int, runs: int) -> dict[str, Any]:
    """{"seconds", "name", "machine"} of one side in its own process, or {"error"}."""
    command = [sys.executable, __file__, kind, str(batch), str(runs)]
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
    return {
        "seconds": statistics.median(interleaved([step], runs)[0]),
        "name": name,
        "machine": where,
    }


if __name__ == "__main__":
    print(json.dumps(part(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
