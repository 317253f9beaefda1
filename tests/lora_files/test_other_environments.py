"""Our files in programs that live in environments of their own (slow: they are installed first).

An environment is .venv-NAME in the project folder: the packages under test without their
dependencies, and the site-packages of the running Python behind them.
"""

import dataclasses
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from hyperlora_jax.lora.sites import LoraSpec, component_tree, site_factors
from hyperlora_jax.lora_files import safetensors_io, save_lora
from tests.lora_files.conftest import random_lora, spec_of

ROOT = Path(__file__).parents[2]
CONSUMER = Path(__file__).with_name("consumer.py")
OLD = ("diffusers==0.33.1", "peft==0.15.2", "transformers==4.51.3", "huggingface_hub<1.0",
       "tokenizers<0.22")  # fmt: skip
LYCORIS = ("lycoris-lora==4.1.3", "einops", "toml")

pytestmark = pytest.mark.slow


def environment(name, packages):
    """Python of .venv-NAME; built once, complete only when its marker is there."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    marker = folder / "packages.txt"
    if marker.exists() and marker.read_text() == "\n".join(packages):
        return python
    run([sys.executable, "-m", "venv", "--clear", str(folder)])
    run([str(python), "-m", "pip", "install", "-q", "--no-deps", *packages])
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "zz_parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    marker.write_text("\n".join(packages))
    return python


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def consume(python, kind, base, files):
    """One result for each file."""
    return json.loads(run([str(python), str(CONSUMER), kind, str(base), *map(str, files)]))


@pytest.fixture(scope="module")
def base(tmp_path_factory, family, modules):
    folder = tmp_path_factory.mktemp(family)
    for name, module in modules.items():
        module.save_pretrained(folder / name)
        if name != "unet":
            with_text_model(folder / name / "model.safetensors")
    return folder


def with_text_model(file):
    """The names of all published text encoders; transformers 5 writes others, but reads these."""
    tensors, metadata = safetensors_io.read(file)
    safetensors_io.write(
        file,
        {
            name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": t
            for name, t in tensors.items()
        },
        metadata,
    )


def write(folder, lora, spec, format):
    """The file, and beside it what it means in PyTorch layout."""
    path = save_lora(folder / f"{format}.safetensors", lora, spec, format, "float32")
    deltas = {}
    for site in spec:
        pair = site_factors(lora, site)
        delta = pair["down"].reshape(site.fan_in, site.rank) @ pair["up"]
        if site.kind == "conv":
            shape = (*site.kernel_size, site.in_features, site.out_features)
            delta = delta.reshape(shape).transpose(3, 2, 0, 1)
        else:
            delta = delta.T
        deltas[site.path] = np.ascontiguousarray(delta)
    np.savez(f"{path}.npz", **deltas)
    return path


def check(results, count):
    for result in results:
        assert result["warnings"] == []
        assert result["modules"] == count
        assert result["max_abs_diff"] < 1e-5
        assert result["output_change"] > 1e-2


def test_diffusers_of_spring_2025(tmp_path, base, modules):
    spec = spec_of(modules)
    mixed = LoraSpec(
        tuple(dataclasses.replace(site, rank=1 + i % 4) for i, site in enumerate(spec))
    )
    python = environment("old", OLD)
    for number, given in enumerate((spec, mixed)):
        lora = random_lora(given)
        folder = tmp_path / str(number)
        # Mixed ranks need the alphas of kohya's form there, as docs/compatibility.md says.
        formats = ("kohya", "diffusers") if given is spec else ("kohya",)
        files = [write(folder, lora, given, format) for format in formats]
        check(consume(python, "diffusers", base, files), len(spec))


def test_peft_of_spring_2025(tmp_path, base, modules):
    spec = spec_of(modules, text=False)
    path = write(tmp_path, component_tree(random_lora(spec), "unet"), spec, "peft")
    check(consume(environment("old", OLD), "peft", base, [path]), len(spec))


def test_lycoris(tmp_path, base, modules, family):
    if family == "sdxl":
        pytest.skip("LyCORIS' wrapper takes diffusers names, SDXL kohya files have sgm names")
    spec = spec_of(modules, text=False)
    path = write(tmp_path, random_lora(spec), spec, "kohya")
    check(consume(environment("lycoris", LYCORIS), "lycoris", base, [path]), len(spec))
