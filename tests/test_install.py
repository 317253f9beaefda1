"""What is built is complete, and works where nothing but it is installed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.serving import served

ROOT = Path(__file__).parents[1]
SOURCE = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "configs", "hyperlora_jax")
MADE = shutil.ignore_patterns("__pycache__")


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_images_get_all_that_the_package_is_made_of(name):
    before, _, _ = (ROOT / "launch" / name).read_text().partition("pip install")
    copied = {word for line in re.findall("^COPY (.*) ", before, re.M) for word in line.split()}
    assert {*SOURCE} - {"LICENSE"} < copied and "constraints.txt" in copied


@pytest.fixture(name="tree", scope="module")
def _tree(tmp_path_factory):
    """The sources alone, as a download has them."""
    tree = tmp_path_factory.mktemp("source")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=MADE)
        else:
            shutil.copy(ROOT / name, tree)
    return tree


def run(*command, cwd):
    """What a command prints; nothing of this checkout is in its environment."""
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = list(map(str, command))
    done = subprocess.run(
        words, cwd=cwd, env=bare, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])
    return done.stdout


@pytest.mark.slow
def test_wheel_and_sdist_hold_everything_and_work_in_a_bare_environment(tree, tmp_path):
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", tree, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    needed = {
        path.relative_to(tree).as_posix()
        for folder in ("configs", "hyperlora_jax")
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    with zipfile.ZipFile(wheel) as file:
        inside = {name.replace("hyperlora_jax/configs/", "configs/") for name in file.namelist()}
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert not needed - inside and not needed - packed

    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    pip = (tmp_path / "venv/bin/pip", "install", "-q", "--no-compile")
    run(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[serve]", cwd=tmp_path)
    works_outside(tmp_path / "venv/bin/hyperlora", tmp_path / "elsewhere")


def works_outside(program, place):
    """The shipped models by name, in a folder with one picture in it."""
    place.mkdir()
    Image.new("RGB", (24, 16), (200, 90, 30)).save(place / "me.png")
    assert "hyperlora COMMAND" in run(program, "--help", cwd=place)
    assert "my_pictures" in run(program, "train", "--help", cwd=place)
    printed = run(program, "train", "--config", "paper", "--print_config", cwd=place)
    assert "train.num_steps" in printed
    assert "Stable Diffusion base" in run(program, "inspect", "tiny-sd", cwd=place)
    assert "hypernetwork" in run(program, "inspect", "avatar-hypernetwork", cwd=place)
    which = ("--checkpoint", "avatar-hypernetwork", "--reference", "me.png")
    assert "wrote me.safetensors" in run(
        program, "generate", *which, "--out", "me.safetensors", cwd=place
    )
    assert "tiny-sd" in run(program, "inspect", "me.safetensors", cwd=place)
    options = ("--lora", "me.safetensors", "--prompt", "smiling mouth", "--num_steps", 2)
    run(program, "sample", "tiny-sd", *options, "--out", "pictures", cwd=place)
    run(program, "export", "avatar-hypernetwork", "--format", "pytorch", "--out", "pt", cwd=place)
    assert list((place / "pictures").glob("*.png")) and (place / "pt/generate.py").exists()
    with served(place, program=(program,)) as (_, address):
        from gradio_client import Client, handle_file

        client = Client(address, verbose=False, download_files=str(place / "down"))
        asked = ([handle_file(str(place / "me.png"))], "smiling mouth", 1.0, 0)
        status, shown, *_ = client.predict(*asked, api_name="/draw")
        client.close()
        assert "ms" in status and "<img" in shown


@pytest.mark.slow
def test_uv_makes_an_environment_and_runs_the_program_without_one(tree, tmp_path):
    uv = (sys.executable, "-m", "uv")
    run(*uv, "sync", "--project", tree, cwd=tmp_path)
    program = tree / ".venv/bin/hyperlora"
    assert "hypernetwork" in run(program, "inspect", "avatar-hypernetwork", cwd=tmp_path)
    assert not list((tree / ".venv").rglob("torch/version.py"))  # gigabytes that nobody asked for
    program = (*uv, "tool", "run", "--from", ".[serve]", "hyperlora")  # as uvx does
    assert "Stable Diffusion base" in run(*program, "inspect", "tiny-sd", cwd=tree)
