"""`hyperlora import` of a matrix, `hyperlora train` on it, and `train` again: LoRAs lie on the disk
once, and a restart looks at none of them but those of its batches."""

import json
from pathlib import Path

import numpy as np
import pytest

from hyperlora_jax.cli.main import main
from hyperlora_jax.targets.lora_targets import LoraTargets
from hyperlora_jax.train.hypernetwork import hypernet_training
from tests import user_world

NUMBERS = 656  # of q and v of the world's base at rank 1
COUNT = 24
SETTINGS = {
    "model.rank": 1, "model.network.scan": False, "model.network.remat": False,
    "model.network.dtype": "float32", "train.batch_size": 4, "train.log_every_steps": 1,
    "train.checkpoint_every_steps": 1, "mesh.fsdp": 1, "data.num_identities": COUNT,
}  # fmt: skip


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    user_world.write_base(root / "base")
    user_world.write_clip(root / "clip")
    people = {f"{k:06d}": (1, (32, 32)) for k in range(COUNT)}
    user_world.write_people(root / "people", people)
    rows = np.random.default_rng(0).normal(0, 0.01, (COUNT, NUMBERS)).astype(np.float32)
    np.save(root / "all_weights.npy", rows)
    arguments = ["import", root / "all_weights.npy", "--base", root / "base"]
    assert main([*map(str, arguments), "--out", str(root / "targets")]) == 0
    return root


def train(world: Path, workdir: Path, num_steps: int, **more) -> list[float]:
    """Losses of the workdir after `hyperlora train` up to a step."""
    settings = {
        **SETTINGS, "base": world / "base", "model.encoder": world / "clip",
        "data.source": world / "people", "data.targets": world / "targets",
        "train.num_steps": num_steps, **more,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    command = ["train", "--config", "configs/w2w_1b.py", "--workdir", str(workdir)]
    assert main([*command, *user_world.SHRUNK, *overrides]) == 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("gauge", ["raw", "procrustes"])
def test_a_restart_reads_no_record_and_repeats_the_run(gauge, world, tmp_path, monkeypatch):
    whole = train(world, tmp_path / "whole", 3, **{"data.gauge": gauge})
    kept = sorted(path.name for path in (world / "targets" / "cache").glob(f"*-{gauge}-*"))
    assert len(kept) == (1 if gauge == "raw" else 2)
    assert not (tmp_path / "whole" / "cache").exists()

    def nothing(*_):
        raise AssertionError("something is read that no step needs")

    monkeypatch.setattr(LoraTargets, "read", nothing)
    monkeypatch.setattr(hypernet_training, "load_frozen", nothing)  # no loss runs the base
    for num_steps in (2, 3):
        parts = train(world, tmp_path / "parts", num_steps, **{"data.gauge": gauge})
    assert parts == whole
