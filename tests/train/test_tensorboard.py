import sys

import pytest
from toy_task import fit_toy

from hyperlora_jax import storage
from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.train import tensorboard


def test_a_run_writes_events(tmp_path):
    fit_toy(tmp_path, num_steps=2, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_events_of_a_workdir_in_a_bucket_are_uploaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(tensorboard, "UPLOAD_SECONDS", 0.0)
    pushed = []

    def push(workdir, *names):
        folder = storage.scratch(workdir)
        pushed.append({file.name: file.stat().st_size for file in (folder / names[0]).iterdir()})

    monkeypatch.setattr(storage, "push", push)
    board = tensorboard.Board("gs://bucket/run")
    board.write({"loss": 1.0}, 1)
    board.close()
    (name,) = pushed[0]
    assert name.startswith("events.out.tfevents.")
    assert 0 < pushed[0][name] <= pushed[-1][name]


def test_a_package_that_is_not_installed_is_missed_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"tensorboardX is not installed; pip install \"hyperlora-"):
        tensorboard.Board(tmp_path)
    config = ("--config", "configs/avatars.py", "--config.train.tensorboard=True")
    assert main(["train", *config, "--workdir", str(tmp_path / "run")]) == 2
    assert "hyperlora train: train.tensorboard: package tensorboardX" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
