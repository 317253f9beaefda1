"""What the loop costs the host: CPU time of the main thread, which a busy machine does not change.

python -m pytest tests/train/test_overhead.py -s      prints the figures
"""

import time

import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import ToyBatches

from hyperlora_jax.train.json_lines import read_rows
from hyperlora_jax.train.loop import Plan, Task, fit

X = np.ones((16, 32), np.float32)


class OneBatch(ToyBatches):
    """The same batch for ever, so that making data costs nothing."""

    def __next__(self):
        self.position += 1
        return {"x": X}


def task(num_trained, num_frozen):
    def init(key):
        return {f"layer_{i}": {"kernel": jnp.full((4, 4), 0.01)} for i in range(num_trained)}

    def loss(params, frozen, batch, key):
        total = sum(leaf["kernel"][0, 0] for leaf in params.values())
        return (batch["x"].mean(-1) - total - frozen["layer_0"][0]) ** 2, {}

    frozen = {f"layer_{i}": jnp.ones(4) for i in range(num_frozen)}
    return Task("overhead", init, loss, frozen, OneBatch())


def run(workdir, num_steps, num_trained, num_frozen, checkpoint_every_steps=10**6):
    began = time.thread_time()
    fit(
        task(num_trained, num_frozen),
        Plan(
            num_steps,
            {"learning_rate": 1e-4, "schedule": "constant"},
            checkpoint_every_steps=checkpoint_every_steps,
        ),
        workdir=workdir,
        progress=False,
    )
    return time.thread_time() - began


@pytest.mark.parametrize(
    ("num_trained", "num_frozen", "limit"),
    [(5, 5, 3.0), pytest.param(60, 686, 10.0, marks=pytest.mark.slow)],
)
def test_host_time_per_step(tmp_path, num_trained, num_frozen, limit):
    run(tmp_path / "warm", 2, num_trained, num_frozen)
    short = run(tmp_path / "short", 10, num_trained, num_frozen)
    long = run(tmp_path / "long", 210, num_trained, num_frozen)
    milliseconds = 1e3 * (long - short) / 200
    print(
        f"\n{num_trained} trained and {num_frozen} frozen arrays:"
        f" {milliseconds:.2f} ms of host CPU a step"
    )
    assert milliseconds < limit


def test_what_a_save_blocks(tmp_path):
    run(tmp_path, 60, 60, 5, checkpoint_every_steps=20)
    saves = [r for r in read_rows(tmp_path / "events.jsonl") if r["event"] == "save"]
    blocked = np.diff([0.0] + [row["buckets"]["save"] for row in saves])
    print(f"\nsaves blocked for {[round(1e3 * float(b)) for b in blocked]} ms (the last one waits)")
    assert len(blocked) == 3
