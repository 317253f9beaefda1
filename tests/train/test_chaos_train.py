"""`hyperlora train` itself, on the avatar world, killed at random moments and started again."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from hyperlora_jax.cli.process import PREEMPTED
from hyperlora_jax.train.checkpoints import restore_params
from hyperlora_jax.train.events import goodput
from hyperlora_jax.train.json_lines import read_rows

NUM_STEPS = 400
SETTINGS = {
    "data.num_identities": 64, "data.num_views": 4, "model.network.width": 32,
    "model.network.depth": 1, "model.network.num_heads": 2, "train.num_steps": NUM_STEPS,
    "train.batch_size": 8, "train.images_per_subject": 1, "train.log_every_steps": 1,
    "train.checkpoint_every_steps": 10, "train.encode_batch_size": 64,
}  # fmt: skip


@pytest.fixture
def start_train(tmp_path):
    """Starts `hyperlora train` in a process of its own with some simulated devices."""

    def start(workdir, devices):
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [
            *(sys.executable, "-m", "hyperlora_jax", "train", "--config", "configs/demo.py"),
            *("--workdir", str(workdir)),
            *(f"--config.{name}={value}" for name, value in SETTINGS.items()),
        ]
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        }  # fmt: skip
        log = (tmp_path / "log.txt").open("a")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    return start


def last_step(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def misfortune(process, workdir, kind, chance):
    """Sends `kind` before the first step, or after some; never to a finished process."""
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0.5, 8.0))
    else:
        until = last_step(workdir) + chance.randint(1, 24)
        while process.poll() is None and last_step(workdir) < until:
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 0.3))  # in the middle of a save too
    if process.poll() is None:
        process.send_signal(kind)
    return process.wait(timeout=600)


def disturbed(start_train, workdir, kills, terminations, devices, seed):
    """Exit codes of all starts until the run is finished."""
    chance = random.Random(seed)
    kinds = [signal.SIGKILL] * kills + [signal.SIGTERM] * terminations
    chance.shuffle(kinds)
    codes = []
    for number, kind in enumerate(kinds):
        process = start_train(workdir, devices[number % len(devices)])
        codes.append(misfortune(process, workdir, kind, chance))
        assert codes[-1] in (PREEMPTED, -signal.SIGKILL, -signal.SIGTERM), codes
        print(f"start {number + 1}: {kind.name} at step {last_step(workdir)}, code {codes[-1]}")
    codes.append(start_train(workdir, devices[0]).wait(timeout=1200))
    assert codes[-1] == 0, codes
    return codes


def losses(workdir):
    return np.asarray([row["loss"] for row in read_rows(workdir / "metrics.jsonl")])


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "kills", "terminations"), [((1,), 12, 3), ((1, 2, 8), 10, 3)])
def test_killed_at_random_moments(tmp_path, start_train, devices, kills, terminations):
    assert start_train(tmp_path / "whole", 1).wait(timeout=1200) == 0
    codes = disturbed(start_train, tmp_path / "cut", kills, terminations, devices, len(devices))
    assert codes.count(-signal.SIGKILL) == kills
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(found) == len(expected) == NUM_STEPS
    buckets = goodput(tmp_path / "cut" / "events.jsonl")
    assert sum(v for k, v in buckets.items() if k != "wall") == pytest.approx(buckets["wall"])
    if devices == (1,):
        trees = [restore_params(tmp_path / name)[0] for name in ("whole", "cut")]
        jax.tree.map(np.testing.assert_array_equal, *trees)
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found[:5], expected[:5], rtol=1e-5)
        np.testing.assert_allclose(found, expected, rtol=1e-3)
