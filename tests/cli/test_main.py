"""The program: exit codes, one-line errors, overrides."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.cli.config import load_config
from hyperlora_jax.cli.main import COMMANDS, main
from hyperlora_jax.errors import Interrupted, Preempted, UserError

AVATARS = "configs/avatars.py"


def run(capsys, *arguments):
    code = main(list(arguments))
    return code, capsys.readouterr().err.strip()


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert "usage" in capsys.readouterr().out


def test_overrides_change_values_of_the_same_type():
    config = load_config(
        AVATARS, ["--config.train.num_steps=7", "--config.train.optimizer.learning_rate=1"]
    )
    assert config.train.num_steps == 7
    assert config.train.optimizer.learning_rate == 1.0
    assert load_config("configs/demo.py").train.num_steps < load_config(AVATARS).train.num_steps


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("--config.train.steps=7", "unknown key 'steps', train has .*num_steps"),
        ("--config.nothing.at=7", "unknown key 'nothing', the config has"),
        ("--config.train.num_steps=many", "got 'many' .str., expected int"),
        ("--config.train.num_steps", "expected --config.section.key=value"),
    ],
)
def test_bad_overrides_are_named(override, reason):
    with pytest.raises(UserError, match=reason):
        load_config(AVATARS, [override])


@pytest.mark.parametrize(
    ("error", "code"),
    [(Interrupted(7, "runs/x"), 130), (KeyboardInterrupt(), 130), (Preempted(7, "runs/x"), 75)],
)
def test_interrupted_commands_have_codes_of_their_own(error, code, monkeypatch, capsys):
    def stopped(args):
        raise error

    monkeypatch.setattr("hyperlora_jax.cli.directions.run", stopped)
    done, said = run(capsys, "directions", "x", "--labels", "y", "--out", "z")
    assert done == code
    assert str(error) in said


def test_wrong_use_is_one_line_and_code_2(capsys, tmp_path):
    work = ["--config", AVATARS, "--workdir", str(tmp_path)]
    out = ["--out", str(tmp_path / "x.safetensors")]
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(picture)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cases = {
        ("fly",): "unknown command 'fly'",
        ("train", "--config", "nowhere.py", "--workdir", str(tmp_path)): "nowhere.py: no such file",
        ("evaluate", "--config", AVATARS, "--workdir", str(tmp_path / "none")): "does not exist",
        ("train", *work, "--config.train.nothing=1"): "unknown key 'nothing'",
        ("train", *work, "--faster"): "unknown argument '--faster'",
        ("train", *work, "--config.base=" + str(tmp_path / "no")): "not a directory",
        ("evaluate", *work): "expected a folder with config.json",
        ("generate", "--checkpoint", str(tmp_path), *out): "expected --reference",
        (
            "generate", "--checkpoint", str(tmp_path), "--reference", str(picture), *out,
        ): "expected a folder with config.json",
        ("inspect", str(tmp_path / "nothing")): "no such file or folder",
        ("distill", "--config", AVATARS, "--workdir", str(text)): "cannot write there",
    }  # fmt: skip
    for arguments, reason in cases.items():
        code, error = run(capsys, *arguments)
        assert code == 2, (arguments, error)
        assert reason in error
        assert "\n" not in error


@pytest.mark.parametrize("arguments", [["--help"], ["fly"]])
def test_a_reader_who_has_enough_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    stream = "stderr" if arguments == ["fly"] else "stdout"
    command = [sys.executable, "-m", "hyperlora_jax", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    done = subprocess.run(command, **pipes, text=True)
    os.close(writing)
    assert (done.returncode, done.stdout or "", done.stderr or "") == (128 + signal.SIGPIPE, "", "")
