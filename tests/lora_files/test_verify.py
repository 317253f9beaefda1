import dataclasses
import sys

import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.factors import zeros
from hyperlora_jax.lora.sites import LoraSpec, spec_from_shapes
from hyperlora_jax.lora_files import save_lora
from hyperlora_jax.lora_files.safetensors_io import read, write
from hyperlora_jax.lora_files.verify import load_modules, verify
from hyperlora_jax.lora_files.writing import FORMATS
from tests.lora_files.conftest import random_lora, shapes_of, spec_of


@pytest.mark.parametrize("format", FORMATS)
def test_pytorch_loads_what_we_write(tmp_path, family, modules, format):
    spec = spec_of(modules, text=format != "weights2weights")
    lora = random_lora(spec)
    name = "a.safetensors" if format == "kohya" else "a"
    path = save_lora(tmp_path / name, lora, spec, format, "float32")
    result = verify(path, modules, lora, spec)
    assert (result.missing_keys, result.unexpected_keys, result.warnings) == ((), (), ())
    assert result.num_sites == len(spec)
    assert result.max_delta_error <= 1e-6
    assert result.max_abs_diff <= 1e-5
    assert result.output_change > 1e-2
    assert result.ok


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_pytorch_loads_mixed_ranks_and_edge_layers(tmp_path, family, modules, format):
    specs = [
        spec_from_shapes(shapes_of(modules[name], name != "unet"), [""], 1,
                         prefix="" if name == "unet" else f"{name}.")
        for name in modules
    ]  # fmt: skip
    every = [site for spec in specs for site in spec]
    sites = [dataclasses.replace(s, rank=1 + i % 5) for i, s in enumerate(every)]
    spec = LoraSpec(tuple(site for site in sites if site.path != "text_encoder_2.text_projection"))
    lora = random_lora(spec)
    path = save_lora(tmp_path / "a", lora, spec, format, "float32", family)
    result = verify(path, modules, lora, spec)
    assert (result.missing_keys, result.unexpected_keys, result.warnings) == ((), (), ())
    assert result.num_sites == len(spec)
    assert result.ok


def test_a_model_directory_serves_as_base(tmp_path, sd1_modules):
    for name, module in sd1_modules.items():
        module.save_pretrained(tmp_path / "base" / name)
    spec = spec_of(sd1_modules, "w2w", rank=1, text=False)
    path = save_lora(tmp_path / "a.safetensors", random_lora(spec), spec, dtype="float32")
    assert verify(path, tmp_path / "base").ok
    with pytest.raises(UserError, match=r"no unet/config\.json"):
        load_modules(tmp_path)


def test_a_wrong_file_is_noticed(tmp_path, sd1_modules):
    spec = spec_of(sd1_modules, "attn-qkvo", text=False)
    lora = random_lora(spec)
    path = save_lora(tmp_path / "a.safetensors", lora, spec, dtype="float32")
    tensors, metadata = read(path)
    square = next(k for k in tensors if k.endswith("attn1_to_q.lora_down.weight"))
    changed = {k: np.copy(v) for k, v in tensors.items()}
    changed[square] = changed[square][:, ::-1]
    write(path, changed, metadata)
    result = verify(path, sd1_modules, lora, spec)
    assert not result.ok
    assert result.max_delta_error > 1e-2
    fewer = {k: v for k, v in tensors.items() if "attn2_to_v" not in k}
    write(path, fewer, metadata)
    result = verify(path, sd1_modules, lora, spec)
    assert len(result.missing_keys) == sum("attn2.to_v" in s.path for s in spec)


def test_a_lora_that_changes_nothing_is_not_ok(tmp_path, sd1_modules):
    spec = spec_of(sd1_modules, "w2w", rank=1, text=False)
    path = save_lora(tmp_path / "a.safetensors", zeros(spec), spec)
    result = verify(path, sd1_modules)
    assert result.output_change == 0
    assert not result.ok


def test_another_base_is_refused_by_pytorch_too(tmp_path, sd1_modules):
    spec = spec_of(sd1_modules, "w2w", rank=1, text=False)
    path = save_lora(tmp_path / "a.safetensors", random_lora(spec), spec)
    tensors, _ = read(path)
    write(path, {k: v[..., :-1] if "lora_down" in k else v for k, v in tensors.items()}, {})
    with pytest.raises(UserError, match="PyTorch refuses it"):
        verify(path, sd1_modules)


def test_without_pytorch_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch is missing.*pip install"):
        load_modules(tmp_path)
