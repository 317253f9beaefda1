"""Compiles a toy step for TPU slices, in a process of its own; prints one JSON record per line."""

import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from hyperlora_jax.aot import ahead_of_time, compile_search

ahead_of_time.prepare_environment()

from hyperlora_jax.parallel.topology import parse  # noqa: E402


def init(key):
    first, second = jax.random.split(key)
    return {
        "up": {"kernel": jax.random.normal(first, (512, 1024))},
        "down": {"kernel": jax.random.normal(second, (1024, 512))},
        "loop": {"kernel": jax.random.normal(second, (8, 512, 512))},
    }


def loss(params, frozen, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["up"]["kernel"]) @ params["down"]["kernel"]
    hidden, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), hidden, params["loop"]["kernel"])
    return jnp.mean((hidden @ frozen["base"] - batch["x"]) ** 2, -1), {}


WORKLOAD = ahead_of_time.Workload(
    name="toy",
    init=init,
    loss=loss,
    frozen={"base": jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)},
    batch=lambda size: {"x": jax.ShapeDtypeStruct((size, 512), jnp.float32)},
)


def main():
    for text in sys.argv[1:]:
        name, *axes = text.split(",")
        mesh = dict(zip(("data", "fsdp", "tensor"), map(int, axes), strict=False))
        if name.startswith("search-"):
            topology = parse(name.removeprefix("search-"))
            with tempfile.TemporaryDirectory() as folder:
                record, again = (
                    compile_search.search([WORKLOAD], topology, limit=4, records=Path(folder))
                    for _ in range(2)
                )
            assert again == record  # its compile_seconds too: read, not compiled
        else:
            record = ahead_of_time.compile_for(
                WORKLOAD, parse(name), mesh_axes=mesh, batch_per_device=64
            )
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
