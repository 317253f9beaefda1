"""Pictures of the embedded base on 1 and on 8 simulated devices; prints one JSON line per mesh.

Arguments: DATA,FSDP,TENSOR ...
"""

import json
import sys

import jax
import numpy as np

from hyperlora_jax.lora import factors
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.stable_diffusion.embedded import load_base

PROMPTS = ["a", "b", "c", "d"]


def draw(mesh):
    sd = load_base("tiny-sd", mesh=mesh)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32),
        factors.zeros(sd.lora_spec("attn-qkvo", 2), len(PROMPTS)),
    )
    images = sd.sample(jax.random.key(0), PROMPTS, lora, num_steps=2, guidance=2.0)
    return np.asarray(images), len(images.sharding.device_set)


def main():
    alone, _ = draw(None)
    for text in sys.argv[1:]:
        images, devices = draw(make_mesh(*map(int, text.split(","))))
        error = float(np.abs(images - alone).max())
        print(json.dumps({"error": error, "devices": devices, "spread": float(np.std(alone))}))


if __name__ == "__main__":
    main()
