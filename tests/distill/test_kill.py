"""`hyperlora distill` killed again and again ends with the LoRAs of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.targets.lora_targets import open_lora_targets
from hyperlora_jax.targets.spool import finished_files

ROOT = Path(__file__).parents[2]
NUM_CONCEPTS = 6


@pytest.fixture(name="concepts", scope="module")
def _concepts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts")
    noise = np.random.default_rng(0)
    for k in range(NUM_CONCEPTS):
        (folder / f"person {k}").mkdir()
        for view in range(3):
            shape = (16, 16, 3) if k % 3 else (10, 18, 3)  # two sizes: two programs
            pixels = noise.integers(0, 255, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"person {k}" / f"{view}.png")
    return folder


def start(concepts, workdir, environment=None):
    settings = {
        "data.source": concepts,
        "data.size": 16,
        "distill.num_concepts": NUM_CONCEPTS,
        "distill.num_slots": 4,  # the last wave is smaller than the first
        "distill.num_steps": 60,
        "distill.steps_per_call": 5,
        "distill.save_every_steps": 10,
        "distill.rank": 2,
        "distill.buckets": True,
    }
    command = [sys.executable, "-m", "hyperlora_jax.cli.main", "distill",
               "--config", str(ROOT / "configs" / "avatars.py"), "--workdir", str(workdir),
               *(f"--config.{key}={value}" for key, value in settings.items())]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment = {**os.environ, **devices, "PYTHONPATH": paths, **(environment or {})}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)


def wait(process, reached):
    """Until `reached()` or the end of the process; whether it still runs."""
    deadline = time.monotonic() + 900
    while process.poll() is None and not reached():
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.01)
    return process.poll() is None


@pytest.fixture(name="whole", scope="module")
def _whole(concepts, tmp_path_factory):
    """The LoRAs of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole")
    assert start(concepts, workdir).wait() == 0
    return open_lora_targets(workdir / "targets")


@pytest.mark.slow
def test_two_hosts_share_the_concepts_and_end_with_the_same_loras(
    concepts, whole, tmp_path, as_hosts
):
    running = [start(concepts, tmp_path, own) for own in as_hosts()]
    wait(running[0], lambda: len(finished_files(tmp_path / "spool")) >= 2)
    for process in running:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    running = [start(concepts, tmp_path, own) for own in as_hosts()]
    assert [process.wait() for process in running] == [0, 0]
    assert not [*tmp_path.glob("slots-*")]
    # Each host had fewer slots: sums in another order, which Adam carries on for 60 steps.
    check(open_lora_targets(tmp_path / "targets"), whole, 1e-3)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_loras(concepts, whole, tmp_path):
    broken = tmp_path / "broken"
    moments = random.Random(0)

    def saved():
        return any(broken.glob("slots-*.safetensors"))

    kills = 0
    for reached in (
        saved,
        lambda: len(finished_files(broken / "spool")) >= 1,
        lambda: len(finished_files(broken / "spool")) >= 3 and saved(),
        lambda: len(finished_files(broken / "spool")) >= NUM_CONCEPTS,
    ):
        process = start(concepts, broken)
        if wait(process, reached):
            time.sleep(moments.uniform(0, 0.3))
            os.kill(process.pid, signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    before = {p.name: p.stat().st_mtime_ns for p in (broken / "spool").iterdir()}
    assert start(concepts, broken).wait() == 0
    after = {p.name: p.stat().st_mtime_ns for p in (broken / "spool").iterdir()}
    # Every start writes down what it was asked for; LoRAs are written once.
    kept = {n: t for n, t in before.items() if not n.startswith((".", "facts"))}
    assert kept
    assert kept.items() <= after.items(), "a finished LoRA was written twice"

    check(open_lora_targets(broken / "targets"), whole)


def check(again, whole, tolerance=1e-6):
    assert again.ids == whole.ids and len(again) == NUM_CONCEPTS
    np.testing.assert_allclose(again.matrix(), whole.matrix(), atol=tolerance)
    assert np.abs(whole.matrix()).max() > 1e-2
    for k in range(NUM_CONCEPTS):
        np.testing.assert_allclose(again[k].loss_curve, whole[k].loss_curve, rtol=1e-4)
        assert again[k].num_steps == whole[k].num_steps == 60
