"""One forward pass of a whole directory in both frameworks: tiny models fast, true sizes slow."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion import pytorch_parity

TOOLS = Path(__file__).parents[2] / "tools"


def test_verify_compares_every_component(tiny_pipeline, pytorch_here, capsys):
    root, _ = tiny_pipeline
    assert main(["inspect", str(root), "--verify"]) == 0
    printed = capsys.readouterr().out
    for output in ("unet.prediction", "vae.mean", "vae.decoded", "text.states"):
        assert output in printed
    assert "DIFFERS" not in printed


def test_a_difference_is_found(tiny_pipeline, tmp_path, monkeypatch, capsys):
    root, _ = tiny_pipeline
    shutil.copytree(root, tmp_path / "sd")
    original, theirs = pytorch_parity._pytorch, {}

    def with_other_weights(folder, part, inputs, variant):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        before = path.read_bytes()
        tensors = load_file(path)
        tensors["conv_out.bias"] = tensors["conv_out.bias"] + np.float32(0.01)
        save_file(tensors, path)
        if part not in theirs:  # a process is slow to start
            theirs[part] = original(folder, part, inputs, variant)
        path.write_bytes(before)
        return theirs[part]

    monkeypatch.setattr(pytorch_parity, "_pytorch", with_other_weights)
    (found,) = pytorch_parity.compare(tmp_path / "sd", parts=["unet"])
    assert not found.ok and found.relative_error > 1e-3
    for name in ("vae", "text_encoder"):
        shutil.rmtree(tmp_path / "sd" / name)
    assert main(["inspect", str(tmp_path / "sd"), "--verify"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_what_pytorch_cannot_read_is_an_error(tiny_pipeline, tmp_path):
    shutil.copytree(tiny_pipeline[0] / "unet", tmp_path / "unet")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="PyTorch cannot run the unet"):
        list(pytorch_parity.compare(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_true_sizes_equal_pytorch(family, tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(TOOLS / "parity.py"), family, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert {row["output"].split(".")[0] for row in rows} == {"unet", "vae", "text"}
    assert all(row["relative_error"] <= 1e-4 for row in rows)
