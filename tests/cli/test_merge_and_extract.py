"""Sums of LoRA files, merged models and LoRAs of the difference, from the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hyperlora_jax.cli.main import run_command
from hyperlora_jax.lora_files import load_lora, read_metadata, save_lora
from tests.lora_files.conftest import random_lora, spec_of, torch_modules
from tests.lora_files.test_round_trip import deltas


@pytest.fixture(name="world", scope="module")
def _world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    modules = torch_modules("sd1")
    for name, module in modules.items():
        module.save_pretrained(folder / "base" / name)
    spec = spec_of(modules, "attn-ff", rank=2, text=False)
    for seed, name in enumerate("ab"):
        texts = {"base_hash": "f" * 64, "seed": seed}
        file = folder / f"{name}.safetensors"
        save_lora(file, random_lora(spec, seed), spec, dtype="float32", metadata=texts)
    return folder, spec


def run(name, *arguments):
    return run_command(name, [str(item) for item in arguments])


def test_weighted_sums_and_what_the_files_share(world, tmp_path, capsys):
    folder, spec = world
    a, b, out = folder / "a.safetensors", folder / "b.safetensors", tmp_path / "c.safetensors"
    wanted = {
        path: 0.5 * value - deltas(random_lora(spec, 1), spec)[path]
        for path, value in deltas(random_lora(spec, 0), spec).items()
    }
    assert run("merge", f"{a}=0.5", f"{b}=-1", "--out", out, "--dtype", "float32") == 0
    assert f"{len(spec)} sites, rank 4" in capsys.readouterr().out
    found = deltas(*load_lora(out))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, atol=1e-6)
    texts = read_metadata(out)
    assert texts["hyperlora.base_hash"] == "f" * 64
    assert "hyperlora.seed" not in texts
    assert run("merge", a, "--rank", 1, "--out", out, "--format", "diffusers") == 0
    assert load_lora(out)[1].max_rank == 1
    for path, value in deltas(*load_lora(out)).items():
        sigma = np.linalg.svd(deltas(random_lora(spec, 0), spec)[path], compute_uv=False)
        np.testing.assert_allclose(np.linalg.norm(value), sigma[0], rtol=2e-3)


def test_a_merged_model_gives_its_lora_back(world, tmp_path, capsys):
    folder, spec = world
    a, tuned, out = folder / "a.safetensors", tmp_path / "tuned", tmp_path / "c.safetensors"
    assert run("merge", f"{a}=2", "--into", folder / "base", "--out", tuned) == 0
    assert run("extract", folder / "base", tuned, "--rank", 2, "--out", out) == 0
    assert "changes of text encoders are not in it" in capsys.readouterr().out
    found = deltas(*load_lora(out, spec))
    for path, value in deltas(random_lora(spec, 0), spec).items():
        np.testing.assert_allclose(found[path], 2 * value, atol=5e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bases_of_pytorch_files_and_of_several_variants(world, tmp_path, capsys, dtype):
    folder, spec = world
    old = shutil.copytree(folder / "base", tmp_path / "old")
    plain = old / "unet" / "diffusion_pytorch_model.safetensors"
    state = {name: x.to(getattr(torch, dtype)) for name, x in load_file(plain).items()}
    torch.save(state, plain.with_suffix(".bin"))
    plain.unlink()
    a, out = folder / "a.safetensors", tmp_path / "c.safetensors"
    assert run("merge", a, "--into", old, "--out", tmp_path / "new") == 0
    assert not list((tmp_path / "new" / "unet").glob("*.bin"))
    new = load_file(tmp_path / "new" / "unet" / plain.name)
    assert {x.dtype for x in new.values()} == {getattr(torch, dtype)}
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3}[dtype]
    for path, change in deltas(random_lora(spec, 0), spec).items():
        old_weight, new_weight = (s[f"{path}.weight"].float().numpy() for s in (state, new))
        change = change.T.reshape(old_weight.shape)
        np.testing.assert_allclose(new_weight, old_weight + change, rtol=tolerance, atol=tolerance)
    assert run("convert", a, "--out", out, "--base", old, "--format", "diffusers") == 0
    capsys.readouterr()
    # What would go on without the LoRA does not go along.
    shutil.copy(old / "unet" / f"{plain.stem}.bin", tmp_path / "new" / "unet")
    assert run("merge", a, "--into", tmp_path / "new", "--out", tmp_path / "newer") == 0
    left_out = "without the LoRA, so left out: unet/diffusion_pytorch_model.bin"
    assert left_out in capsys.readouterr().err
    assert not list((tmp_path / "newer" / "unet").glob("*.bin"))
    # In shards, as older versions of diffusers wrote large models.
    weight_map = {}
    for k, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        shard = f"{plain.stem}-0000{k + 1}-of-00002.bin"
        torch.save({name: state[name] for name in names}, old / "unet" / shard)
        weight_map |= dict.fromkeys(names, shard)
    (old / "unet" / f"{plain.stem}.bin").unlink()
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (old / "unet" / f"{plain.stem}.bin.index.json").write_text(index)
    assert run("merge", a, "--into", old, "--out", tmp_path / "shards") == 0
    assert not list((tmp_path / "shards").rglob("*.bin*"))
    assert run("extract", tmp_path / "new", tmp_path / "shards", "--rank", 1, "--out", out) == 0
    assert "both models are the same in these layers" in capsys.readouterr().out


def test_wrong_use_is_one_line_and_code_2(world, tmp_path, capsys):
    folder, _ = world
    a, base, out = folder / "a.safetensors", folder / "base", tmp_path / "c.safetensors"
    for arguments, message in (
        (("merge", f"{a}=x", "--out", out), "expected LORA=WEIGHT"),
        (("merge", folder / "none.safetensors", "--out", out), "no such file"),
        (("merge", a, "--rank", 0, "--out", out), "--rank is 0, expected at least 1"),
        (("merge", a, "--into", tmp_path, "--out", out), "the UNet of a diffusers model directory"),
        (("merge", a, "--into", base, "--out", base), "already exists, expected a new folder"),
        (("extract", base, tmp_path, "--out", out), "the UNet of a diffusers model directory"),
        (("extract", base, base, "--rank", -1, "--out", out), "--rank is -1"),
    ):
        assert run(*arguments) == 2, arguments
        shown = capsys.readouterr().err.strip()
        assert message in shown
        assert "\n" not in shown
        assert not out.exists()
