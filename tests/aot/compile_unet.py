"""Compiles the LoRA step of a two-level UNet for TPU slices; prints one JSON record per line.

Arguments: SLICE,DATA,FSDP,TENSOR:HEADS[:REMAT] ...
"""

import json
import sys
from pathlib import Path

from hyperlora_jax.aot import ahead_of_time

ahead_of_time.prepare_environment()

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from lora_workload import lora_workload  # noqa: E402

from hyperlora_jax.parallel.topology import parse  # noqa: E402


def config(heads):
    return {
        "sample_size": 32,  # 1,024 tokens on the fine level: long enough for splash attention
        "block_out_channels": [40 * heads, 80 * heads],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "norm_num_groups": 8,
        "cross_attention_dim": 64,
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": heads,  # the number of heads, as in every SD config
    }


def main():
    for text in sys.argv[1:]:
        text, heads, *remat = text.replace("v5e:", "v5e~").split(":")
        text = text.replace("~", ":")
        name, *axes = text.split(",")
        mesh = dict(zip(("data", "fsdp", "tensor"), map(int, axes), strict=True))
        remat = remat[0] if remat else "none"
        workload = lora_workload(config(int(heads)), condition_width=8, remat=remat)
        record = ahead_of_time.compile_for(
            workload, parse(name), mesh_axes=mesh, batch_per_device=2, low_effort=True
        )
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
