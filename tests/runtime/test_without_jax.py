"""The first half of docs/gpu_inference.md as it stands there, where there is no JAX."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.runtime.pytorch_folder import write_pytorch
from tests.runtime.conftest import hypernetwork
from tests.stable_diffusion import conftest as tiny

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "gpu_inference.md").read_text().partition("# Using the files")[0]
COMMANDS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)[0].splitlines()
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
REFUSING = """
import sys, runpy
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "hyperlora_jax", "tests"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
UNET = """
import types, torch
from diffusers import UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained("unet")
torch.manual_seed(0)
inputs = torch.randn(1, 4, 16, 16), 10, torch.randn(1, 7, unet.config.cross_attention_dim)
pipe = types.SimpleNamespace(unet=unet)
def render(prompt):
    with torch.no_grad():
        return unet(*inputs, return_dict=False)[0]
"""


@pytest.fixture(name="site")
def _site(tmp_path):
    """A folder with an exported hypernetwork, two pictures and the UNet that it is for."""
    unet = tiny.torch_unet(tiny.tiny_unet_config())
    sites = [
        LoraSite(name, module.weight.shape[1], module.weight.shape[0], 2)
        for name, module in unet.named_modules()
        if re.search(r"attn[12]\.to_[qv]$", name)
    ]
    write_pytorch(hypernetwork("knn", spec=LoraSpec(tuple(sites))), tmp_path / "hypernetwork")
    unet.save_pretrained(tmp_path / "unet")
    for number, name in enumerate(("anna", "ben")):
        Image.new("RGB", (40, 30), (200 * number, 90, 30)).save(tmp_path / f"{name}.png")
    return tmp_path


def run(site, *command):
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, cwd=site
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check(site):
    files = [site / name for name in ("anna.safetensors", "both.safetensors", "ben_peft")]
    files.append(site / "ben.safetensors")
    assert all(load_lora(file)[0] for file in files)


def test_the_document_runs_where_jax_is_refused(site):
    for command in COMMANDS:
        assert "wrote" in run(site, sys.executable, "-c", REFUSING, *shlex.split(command)[1:])
    (site / "program.py").write_text(PROGRAMS[0])
    run(site, sys.executable, "-c", REFUSING, "program.py")
    check(site)


@pytest.mark.slow
def test_the_document_runs_in_an_environment_of_its_own(site, tmp_path_factory):
    python = tmp_path_factory.mktemp("venv") / "bin" / "python"
    run(site, sys.executable, "-m", "venv", python.parents[1])
    pins = ROOT / "constraints.txt"
    run(site, python, "-m", "pip", "install", "-q", "-c", pins, "torch==2.13.0")
    packages = ("safetensors", "pillow", "numpy", "diffusers", "transformers", "peft")
    run(site, python, "-m", "pip", "install", "-q", "-c", pins, *packages)
    assert "jax" not in run(site, python, "-m", "pip", "list").lower()
    for command in COMMANDS:
        run(site, python, *shlex.split(command)[1:])
    last = "assert (anna != ben).any() and (render('') != ben).any()\n"
    (site / "program.py").write_text("".join([PROGRAMS[0], UNET, PROGRAMS[1], last]))
    run(site, python, "program.py")
    check(site)
