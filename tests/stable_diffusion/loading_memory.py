"""Peak host memory of reading a model; prints one JSON line.

Arguments: SMALL_MODEL MODEL DTYPE DATA,FSDP,TENSOR. The small model is read first, so that what a
process needs for the first one (imports, JAX's start) does not count.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.stable_diffusion.model import StableDiffusion


def peak_bytes():
    # Not getrusage's figure: that starts with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])


def main():
    small, model, dtype, axes = sys.argv[1:]
    mesh = make_mesh(*map(int, axes.split(",")))
    for path in (small, model):
        before = peak_bytes()
        sd = StableDiffusion.from_pretrained(path, jnp.dtype(dtype), mesh=mesh)
    leaves = jax.tree.leaves(sd.params)
    spread = sum(leaf.nbytes for leaf in leaves if not leaf.is_fully_replicated)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    sizes = {name: sum(x.nbytes for x in jax.tree.leaves(p)) for name, p in sd.params.items()}
    record = {"grown": peak_bytes() - before, "held": held, "spread": spread, "sizes": sizes}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
