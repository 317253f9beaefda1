"""Two processes with four devices each, over the real collectives and coordination service."""

import json
import signal
import subprocess

import numpy as np
import pytest
from toy_task import fit_toy

from hyperlora_jax.cli.process import PREEMPTED
from hyperlora_jax.train.checkpoints import complete_steps
from hyperlora_jax.train.json_lines import read_rows


@pytest.fixture
def start_two(start_toy, as_hosts):
    """Starts two processes of one run; `first` and `second` are their own further arguments."""

    def start(*arguments, first=(), second=(), devices=4):
        running = [
            start_toy(*arguments, *own, devices=devices, environment=environment)
            for own, environment in zip((first, second), as_hosts(), strict=True)
        ]
        results = []
        for process in running:
            try:
                out, err = process.communicate(timeout=150)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            results.append((process.returncode, out, err))
        return results

    return start


def losses(workdir):
    return np.asarray([row["loss"] for row in read_rows(workdir / "metrics.jsonl")])


def test_two_hosts_train_as_one_and_agree_on_preemption(tmp_path, start_two):
    fit_toy(tmp_path / "alone", num_steps=60)  # a busy machine hears of the end many steps later
    mesh = ("--mesh", "2,2,2,8", "--flat", "--num_steps", 60, "--workdir", tmp_path / "pod")
    results = start_two(*mesh, second=("--terminate_at", 7))
    assert [code for code, *_ in results] == [PREEMPTED, PREEMPTED], results
    saved = complete_steps(tmp_path / "pod" / "checkpoints")[-1]
    assert 7 <= saved < 60
    results = start_two(*mesh)
    assert [code for code, *_ in results] == [0, 0], results
    reports = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert [report["host_rows"] for report in reports] == [[*range(8)], [*range(8, 16)]]
    assert reports[0]["norm"] == reports[1]["norm"]
    alone, pod = losses(tmp_path / "alone"), losses(tmp_path / "pod")
    np.testing.assert_allclose(pod[:5], alone[:5], rtol=1e-5)
    np.testing.assert_allclose(pod, alone, rtol=1e-3)


def test_hosts_whose_rows_lie_apart_train_as_one(tmp_path, start_two):
    fit_toy(tmp_path / "alone", num_steps=6)
    mesh = ("--mesh", "4,1,2,8", "--interleaved", "--flat", "--num_steps", 6)
    results = start_two(*mesh, "--workdir", tmp_path / "pod")
    assert [code for code, *_ in results] == [0, 0], results
    reports = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    rows = [report["host_rows"] for report in reports]
    assert rows == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    alone, pod = losses(tmp_path / "alone"), losses(tmp_path / "pod")
    np.testing.assert_allclose(pod, alone, rtol=1e-5)


@pytest.mark.slow
def test_a_worker_that_stalls_is_named(tmp_path, start_two):
    results = start_two(
        *("--mesh=-1,1,1,8", "--flat", "--workdir", tmp_path, "--stall_timeout", 4),
        second=("--hang_at", 6),
    )
    assert all(code < 0 for code, *_ in results)
    assert -signal.SIGABRT in [code for code, *_ in results]
    assert "behind are processes [1]" in results[0][2]
