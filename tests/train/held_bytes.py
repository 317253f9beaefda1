"""Prints, as JSON, what devices hold when a run of `hyperlora` makes its first step, in bytes.

    python tests/train/held_bytes.py {train,pretrain,distill} --config FILE --workdir DIR …

`trees` says it by tree, of the device with the most; `others` is what lies on any of the devices
besides, all of them together. Then, but for `distill`, comes as `compiled` what `hyperlora compile`
counts as arguments of a device for the same config and mesh. The step itself is not made.
"""

import json
import sys

import jax

from hyperlora_jax.aot import ahead_of_time, workloads
from hyperlora_jax.cli.config import load_config
from hyperlora_jax.cli.main import main
from hyperlora_jax.distill import slots
from hyperlora_jax.train import loop


def parts_of(tree):
    """{(device, address): bytes} of the pieces of all arrays of a tree; one that two arrays share
    is there once."""
    return {
        (shard.device.id, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.data.nbytes
    }


def most(parts):
    devices = {device for device, _ in parts}
    return max(
        (sum(size for (own, _), size in parts.items() if own == device) for device in devices),
        default=0,
    )


def report(trees):
    """Says what lies on the devices, named by trees of arrays."""
    found = {name: parts_of(tree) for name, tree in trees.items()}
    arguments = {part: size for parts in found.values() for part, size in parts.items()}
    live = [a for a in jax.live_arrays() if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)]
    others = {part: size for part, size in parts_of(live).items() if part not in arguments}
    said = {
        "trees": {name: most(parts) for name, parts in found.items()},
        "arguments": most(arguments),
        "others": sum(others.values()),
        "others on a device": most(others),
    }
    print(json.dumps(said), flush=True)


def counted(arguments, mesh):
    file = arguments[arguments.index("--config") + 1]
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    config = load_config(file, overrides)
    size = config.train.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    traced = ahead_of_time.trace(workloads.config_workload(config), mesh, size)
    return traced.lower().compile().memory_analysis().argument_size_in_bytes


def run(arguments):
    def watched(mesh, *_, **__):
        def first(state, frozen, batch, key):
            trees = {
                "parameters": state.params,
                "average": state.ema,
                "optimiser": (state.opt_state, state.step),
                **{f"frozen {name}": tree for name, tree in frozen.items()},
                "batch": batch,
                "key": jax.random.key_data(key),
            }
            report(trees)
            print(json.dumps({"compiled": counted(arguments, mesh)}), flush=True)
            raise SystemExit(0)

        return first

    def advance(state, weights, *_, **__):
        report({"slots": state, "frozen unet": weights})
        raise SystemExit(0)

    loop.jit_step, slots.advance = watched, advance
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
