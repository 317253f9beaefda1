"""docs/your_own_pictures.md, command by command, on a base that other software wrote."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import user_world

PAGE = Path("docs/your_own_pictures.md")
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A run of minutes instead of hours; nothing else is changed.
SHORTER = {
    "train": (*user_world.SHRUNK, "--config.train.num_steps=3"),
    "evaluate": ("--config.evaluate.num_sampling_steps=2",),
    "refine": ("--num_steps", "2"),
}


def comparable(line):
    """A printed line without what differs between runs: numbers, hashes, times."""
    return re.sub(r"[0-9a-f]{12,}|\d[\d,.:]*", "#", line).strip()


def commands(block):
    """(command, lines that the page shows behind it) of a console block."""
    found = []
    for line in block.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            found.append((shlex.split(line[2:]), []))
        elif line.strip():
            found[-1][1].append(line)
    return found


def environment(folder):
    """The repository's code, seen from another working folder."""
    paths = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path):
    user_world.write_all(tmp_path)
    (tmp_path / "configs").symlink_to(Path("configs").absolute())
    settings = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 900}
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert sum(kind == "console" for kind, _ in blocks) >= 6
    for kind, block in blocks:
        if kind == "python":
            done = subprocess.run(
                [sys.executable, "-c", block], env=environment(tmp_path), **settings
            )
            assert done.returncode == 0, done.stderr[-2000:]
            continue
        for (program, command, *rest), shown in commands(block):
            assert program == "hyperlora"
            arguments = ["-m", "hyperlora_jax", command, *rest, *SHORTER.get(command, ())]
            done = subprocess.run(
                [sys.executable, *arguments], env=environment(tmp_path), **settings
            )
            printed = done.stdout + done.stderr
            assert done.returncode == 0, (command, printed[-2000:])
            assert "Traceback" not in printed
            lines = {comparable(line) for line in printed.splitlines()}
            missing = [line for line in shown if comparable(line) not in lines]
            assert shown and not missing, (command, missing, printed[-3000:])
    written = ("anna.safetensors", "anna-refined.safetensors", "anna.png", "runs/me/report")
    assert all((tmp_path / name).exists() for name in written)
