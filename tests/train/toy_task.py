"""The tiny MLP task of these tests, and a program that trains it (for kills and for meshes)."""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.cli.process import PREEMPTED
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import multihost
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.parallel.sharding import gather, host_rows
from hyperlora_jax.train.interruption import Preempted
from hyperlora_jax.train.loop import Plan, Task, fit


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
    planned = {
        "num_steps": num_steps,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "log_every_steps": 1,
        "checkpoint_every_steps": 5,
        "ema_decay": 0.9,
    }
    own = {f.name for f in dataclasses.fields(Plan)}
    plan = Plan(**{**planned, **{k: v for k, v in overrides.items() if k in own}})
    others = {k: v for k, v in overrides.items() if k not in own}
    return fit(task or toy_task(), plan, workdir=workdir, **{"progress": False, **others})


class HostBatches(ToyBatches):
    """One process's rows of each batch."""

    def __init__(self, hook, mesh, global_size=16):
        super().__init__(global_size, hook)
        self.rows = host_rows(mesh, global_size)

    def __next__(self):
        return {name: leaf[self.rows] for name, leaf in super().__next__().items()}


def misfortune(args):
    """What befalls this process before a batch."""

    def hook(n):
        if n == args.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        once = pathlib.Path(args.workdir, "was-terminated")
        if n == args.terminate_once_at and jax.process_index() == 1 and not once.exists():
            once.write_text("")
            os.kill(os.getpid(), signal.SIGTERM)
        if n == args.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if n == args.hang_at:
            time.sleep(600)
        if n == args.full_at:  # what writes see as a full disk: no file may grow beyond this
            while not pathlib.Path(args.workdir, "checkpoints", "5").exists():
                time.sleep(0.05)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        if args.step_seconds:
            time.sleep(args.step_seconds)

    return hook


def main():
    """Trains in a process of its own; --mesh may be given several times, one workdir each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--mesh", action="append", default=[], help="data,fsdp,tensor,devices")
    parser.add_argument("--flat", action="store_true", help="one mesh: no folder of its own")
    parser.add_argument("--interleaved", action="store_true", help="two hosts' devices in turns")
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--optimizer", default="adamw")
    for name in ("kill_at", "terminate_at", "terminate_once_at", "hang_at", "full_at"):
        parser.add_argument(f"--{name}", type=int, default=-1)
    parser.add_argument("--stall_timeout", type=int, default=0)
    parser.add_argument("--step_seconds", type=float, default=0.0)
    args = parser.parse_args()
    multihost.start(timeout_seconds=60, heartbeat_seconds=10)
    for text in args.mesh or ["-1,1,1,1"]:
        data, fsdp, tensor, devices = (int(part) for part in text.split(","))
        chosen = jax.devices()[:devices]
        if args.interleaved:  # two of the first host, two of the second, …
            chosen = np.reshape(chosen, (2, -1, 2)).swapaxes(0, 1).ravel().tolist()
        mesh = make_mesh(data, fsdp, tensor, chosen)
        workdir = args.workdir + (
            f"/{text.replace(',', '-')}" if args.mesh and not args.flat else ""
        )
        task = toy_task(batches=HostBatches(misfortune(args), mesh))
        every = 1 if args.full_at < 0 else 1000
        try:
            state = fit_toy(
                workdir,
                task,
                mesh=mesh,
                num_steps=args.num_steps,
                optimizer={"name": args.optimizer, "learning_rate": 1e-2, "warmup_steps": 2},
                log_every_steps=every,
                stall_timeout_seconds=args.stall_timeout,
            )
        except Preempted as error:
            print(error, file=sys.stderr)
            return PREEMPTED
        except UserError as error:
            print(error, file=sys.stderr)
            os._exit(2)  # as a thread of the failed writer may still hold the process
        placed = {str(tuple(leaf.sharding.spec)) for leaf in jax.tree.leaves(state.params)}
        whole = gather(state.params, mesh)
        report = {
            "mesh": text,
            "step": int(state.step),
            "placed": sorted(placed),
            "host_rows": host_rows(mesh, 16).tolist(),
            "norm": float(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(whole))),
        }
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
