import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

import hyperlora_jax
from hyperlora_jax.cli.config import load_config
from hyperlora_jax.cli.main import main
from hyperlora_jax.pretrain.pretraining import pretrain
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.train.json_lines import read_rows

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "tiny_sd.py"


@pytest.fixture
def config():
    spec = importlib.util.spec_from_file_location("tiny_sd", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.num_identities, config.data.num_views = 8, 2
    config.base.unet.block_out_channels = (16, 16)
    config.autoencoder.num_steps = config.train.num_steps = 3
    config.autoencoder.batch_size = config.train.batch_size = 8
    config.autoencoder.log_every_steps = config.train.log_every_steps = 1
    return config


@pytest.mark.slow
def test_a_base_is_trained_exported_and_trained_only_once(config, tmp_path):
    out = pretrain(config, tmp_path / "run")
    assert out == epath.Path(tmp_path / "run" / "base")
    sd = load_base(str(out))
    image = np.asarray(sd.sample(jax.random.key(0), ["blue background"], num_steps=2))
    assert image.shape == (1, 16, 16, 3)
    assert np.isfinite(image).all()
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3
    pretrain(config, tmp_path / "run")
    assert len(list(read_rows(tmp_path / "run" / "metrics.jsonl"))) == 3
    again = load_base(str(out))
    assert again.base_hash == sd.base_hash


@pytest.mark.parametrize("name", ["tiny_sd", "finetune_unet", "avatar_encoder", "avatar_probe"])
def test_nothing_is_written_into_the_package(name, tmp_path, capsys):
    jax.devices()  # as many as the other tests of this process have
    inside = pathlib.Path(hyperlora_jax.__file__).parent / "assets" / "tiny-sd"
    run = ["pretrain", "--config", str(CONFIG.with_name(f"{name}.py"))]
    assert load_config(run[2]).export.path == ""  # a folder of the workdir
    for argument in (f"--config.export.path={inside}", f"--workdir={inside}/run"):
        assert main([*run, "--workdir", str(tmp_path / "run"), argument]) == 2
        assert "lies in the installed package" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (inside / "run").exists()


@pytest.mark.slow
def test_two_processes_train_the_base_that_one_does(tmp_path):
    def trained(processes, devices):
        work = tmp_path / f"{processes}x{devices}"
        changes = {
            "data.num_identities": 8, "data.num_views": 2, "mesh.data": 1, "mesh.fsdp": 2,
            "base.unet.block_out_channels": "(16,16)", "export.path": work / "base",
            "autoencoder.num_steps": 3, "autoencoder.batch_size": 8,
            "train.num_steps": 3, "train.batch_size": 8, "train.log_every_steps": 1,
        }  # fmt: skip
        done = subprocess.run(
            [
                *("bash", ROOT / "launch" / "local_processes.sh", str(processes), str(devices)),
                *(sys.executable, "-m", "hyperlora_jax", "pretrain", "--config", CONFIG),
                *("--workdir", work, *(f"--config.{k}={v}" for k, v in changes.items())),
            ],
            env={**os.environ, "MAX_RESTARTS": "0"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"wrote {work / 'base'}") == 1  # gloo writes there, too
        weights = load_file(work / "base" / "unet" / "diffusion_pytorch_model.safetensors")
        return [row["loss"] for row in read_rows(work / "metrics.jsonl")], weights

    (one, first), (two, second) = trained(1, 2), trained(2, 1)
    np.testing.assert_allclose(two, one, rtol=1e-5)
    for name, expected in first.items():  # float16, and Adam's first steps enlarge rounding
        np.testing.assert_allclose(second[name], expected, atol=2e-3, err_msg=name)
