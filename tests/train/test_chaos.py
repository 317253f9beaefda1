"""Kills at random moments: the final parameters equal those of the undisturbed run bit for bit."""

import json
import random
import signal
import time

import numpy as np
import pytest
from toy_task import fit_toy

from hyperlora_jax.cli.process import PREEMPTED
from hyperlora_jax.train.checkpoints import restore_params
from hyperlora_jax.train.events import goodput

SHORT, LONG = 40, 800


def disturbed_run(start_toy, workdir, num_steps, kills, terminations, seed, devices=(1,)):
    """Runs to the end through SIGKILLs and SIGTERMs at random times; returns the exit codes."""
    chance = random.Random(seed)
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terminations
    chance.shuffle(signals)
    codes = []
    for number in range(200):
        count = devices[number % len(devices)]
        process = start_toy(
            *("--workdir", workdir, "--num_steps", num_steps, "--step_seconds", 0.1),
            *(f"--mesh=-1,1,1,{count}", "--flat"),
            devices=count,
        )
        if signals:
            # Also before the first step, also in the middle of a save.
            time.sleep(chance.uniform(2.0, 6.0))
            process.send_signal(signals.pop())
        process.communicate(timeout=900)
        codes.append(process.returncode)
        assert process.returncode in (0, PREEMPTED, -signal.SIGKILL, -signal.SIGTERM)
        if process.returncode == 0 and not signals:
            return codes
        if process.returncode == 0:
            raise AssertionError(f"finished with {len(signals)} signals left: make the run longer")
    raise AssertionError(f"not finished after 200 starts: {codes}")


def assert_same_parameters(found, expected):
    found, _ = restore_params(found)
    expected, _ = restore_params(expected)
    assert json.dumps(sorted(found)) == json.dumps(sorted(expected))
    for name, group in expected.items():
        for leaf, value in group.items():
            np.testing.assert_array_equal(found[name][leaf], value)


def test_a_few_kills(tmp_path, start_toy):
    fit_toy(tmp_path / "whole", num_steps=SHORT)
    codes = disturbed_run(start_toy, tmp_path / "cut", SHORT, kills=1, terminations=1, seed=1)
    assert codes[-1] == 0
    assert_same_parameters(tmp_path / "cut", tmp_path / "whole")
    buckets = goodput(tmp_path / "cut" / "events.jsonl")
    assert sum(v for k, v in buckets.items() if k != "wall") == pytest.approx(buckets["wall"])


@pytest.mark.slow
def test_many_kills(tmp_path, start_toy, run_toy):
    run_toy("--workdir", tmp_path / "whole", "--num_steps", LONG, timeout=900)
    codes = disturbed_run(start_toy, tmp_path / "cut", LONG, kills=20, terminations=5, seed=2)
    assert codes.count(-signal.SIGKILL) == 20
    assert_same_parameters(tmp_path / "cut", tmp_path / "whole")
