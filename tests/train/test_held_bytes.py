"""What a run holds on its devices is what `hyperlora compile` counts, and nothing lies besides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import user_world
from tests.stable_diffusion.conftest import write_xl

SCRIPT = Path(__file__).parent / "held_bytes.py"
DEVICES = 8
SMALL = 4096  # bytes of a device: constants of compiled programs, the random key
MESH = ("--config.mesh.data=4", "--config.mesh.fsdp=2")
TRAINING = (
    "train", "--config", "configs/avatars.py", *user_world.SHRUNK, *MESH,
    "--config.train.batch_size=8", "--config.train.images_per_subject=2",
)  # fmt: skip
TUNING = ("pretrain", "--config", "configs/finetune_unet.py", *MESH, "--config.train.batch_size=8")
DISTILLING = (
    "distill", "--config", "configs/avatars.py", "--config.distill.num_concepts=3",
    "--config.distill.num_slots=8", "--config.distill.encoders=('avatar',)",
)  # fmt: skip


def held(*arguments):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, done.stderr[-2000:]
    return {name: value for line in lines for name, value in json.loads(line).items()}


@pytest.fixture(name="disk", scope="module")
def _disk(tmp_path_factory):
    root = tmp_path_factory.mktemp("disk")
    user_world.write_base(root / "sd")
    write_xl(root / "xl")
    user_world.write_clip(root / "clip")
    sizes = dict.fromkeys(("anna", "bert", "carl"), (2, (32, 32)))
    user_world.write_people(root / "people", sizes)
    return root


def shown(disk, base):
    return (
        f"--config.base={disk / base}", f"--config.data.source={disk / 'people'}",
        "--config.data.num_identities=3",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("base", "dtype"),
    [("xl", "bfloat16"), pytest.param("sd", "float32", marks=pytest.mark.slow)],
)
def test_a_run_holds_what_compile_counts(base, dtype, disk, tmp_path):
    settings = (f"--config.model.encoder={disk / 'clip'}", f"--config.train.dtype={dtype}")
    found = held(*TRAINING, *shown(disk, base), *settings, "--workdir", tmp_path)
    assert found["trees"]["frozen unet"] > 100 * SMALL, "what there is, is seen"
    assert sum(found["trees"].values()) == found["arguments"] == found["compiled"]
    assert found["others on a device"] <= SMALL


@pytest.mark.slow
def test_so_does_the_training_of_a_whole_unet(disk, tmp_path):
    found = held(*TUNING, *shown(disk, "xl"), "--workdir", tmp_path)
    assert found["arguments"] == found["compiled"]
    assert found["others on a device"] <= SMALL


def test_distillation_holds_its_loras_and_the_unet(disk, tmp_path):
    found = held(*DISTILLING, *shown(disk, "xl"), "--workdir", tmp_path)
    assert sum(found["trees"].values()) == found["arguments"] > 100 * SMALL
    assert found["others on a device"] <= SMALL
