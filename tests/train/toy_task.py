"""The tiny MLP task of these tests, and a program that trains it (for kills and for meshes)."""

import argparse
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.train.loop import Task, fit
from hyperlora_jax.train.preemption import EXIT_CODE, Preempted


class ToyBatches:
    """Endless batches, each drawn from its own seed; `hook(n)` runs before batch n."""

    def __init__(self, size=16, hook=None):
        self.size, self.hook, self.position = size, hook, 0

    def __iter__(self):
        return self

    def __next__(self):
        n = self.position
        if self.hook:
            self.hook(n)
        self.position += 1
        x = np.random.default_rng(n).normal(size=(self.size, 8)).astype(np.float32)
        record_id = [f"record-{n}-{i}" for i in range(self.size)]
        return {"x": x, "y": 2 * x[:, :4], "record_id": np.asarray(record_id)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def init(key):
    first, second = jax.random.split(key)
    return {
        "hidden": {"kernel": 0.3 * jax.random.normal(first, (8, 32)), "bias": jnp.zeros(32)},
        "out": {"kernel": 0.1 * jax.random.normal(second, (32, 4))},
    }


def loss(params, frozen, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    out = hidden @ params["out"]["kernel"] + frozen["shift"]
    error = out + 0.1 * jax.random.normal(key, out.shape) - batch["y"]
    return jnp.mean(error**2, -1), {"absolute_error": jnp.mean(jnp.abs(error), -1)}


def toy_task(hook=None, size=16, facts=None, **overrides):
    fields = {
        "name": "toy",
        "init": init,
        "loss": loss,
        "frozen": {"shift": jnp.full((4,), 0.5)},
        "batches": ToyBatches(size, hook),
        "facts": facts or {"spec": "abc"},
    }
    return Task(**{**fields, **overrides})


def fit_toy(workdir, task=None, num_steps=12, **overrides):
    arguments = {
        "num_steps": num_steps,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "log_every_steps": 1,
        "checkpoint_every_steps": 5,
        "ema_decay": 0.9,
        "progress": False,
    }
    return fit(task or toy_task(), workdir=workdir, **{**arguments, **overrides})


def main():
    """Trains in a process of its own; --mesh may be given several times, one workdir each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--mesh", action="append", default=[], help="data,fsdp,tensor,devices")
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--kill_at", type=int, default=-1, help="SIGKILL before this batch")
    parser.add_argument("--terminate_at", type=int, default=-1, help="SIGTERM before this batch")
    args = parser.parse_args()

    def hook(n):
        if n == args.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if n == args.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)

    for text in args.mesh or ["-1,1,1,1"]:
        data, fsdp, tensor, devices = (int(part) for part in text.split(","))
        mesh = make_mesh(data, fsdp, tensor, jax.devices()[:devices])
        workdir = args.workdir + (f"/{text.replace(',', '-')}" if args.mesh else "")
        try:
            state = fit_toy(workdir, toy_task(hook), mesh=mesh, num_steps=args.num_steps)
        except Preempted as error:
            print(error, file=sys.stderr)
            return EXIT_CODE
        placed = {str(tuple(leaf.sharding.spec)) for leaf in jax.tree.leaves(state.params)}
        print(json.dumps({"mesh": text, "step": int(state.step), "placed": sorted(placed)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
