"""What a LoraConfig says, by PEFT and diffusers themselves: the change of the weights is theirs."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import site_factors
from hyperlora_jax.lora_files import load_lora, lora_config
from tests.stable_diffusion import conftest as tiny

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONFIGS = {
    "alpha 16": {"lora_alpha": 16},
    "alpha 1": {"lora_alpha": 1},
    "rslora": {"lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "lora_alpha": 2,
        "alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 12},
        "rank_pattern": {QUERY: 2},
    },
}


def adapted_unet(**config):
    """A tiny UNet of diffusers with a random PEFT adapter, and {layer: true change}."""
    from peft import LoraConfig

    unet = tiny.torch_unet(tiny.tiny_unet_config())
    settings = {"r": 4, "target_modules": ["to_q", "to_out.0"], **config}
    unet.add_adapter(LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    truth = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            with torch.no_grad():
                shape = module.lora_B["default"].weight.shape
                module.lora_B["default"].weight.copy_(torch.randn(shape, generator=generator))
            truth[name] = module.get_delta_weight("default").detach().numpy()
    assert len(truth) > 6
    return unet, truth


def assert_equals(path, truth):
    lora, spec = load_lora(path)
    assert {site.path for site in spec.sites} == set(truth)
    for site in spec.sites:
        pair = site_factors(lora, site)
        delta = (pair["down"].reshape(site.fan_in, site.rank) @ pair["up"]).T
        np.testing.assert_allclose(delta, truth[site.path], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_unet_that_was_saved_by_itself(name, tmp_path):
    unet, truth = adapted_unet(**CONFIGS[name])
    unet.save_lora_adapter(tmp_path)  # keys and config without "unet."
    assert_equals(tmp_path / "pytorch_lora_weights.safetensors", truth)


@pytest.mark.parametrize("name", CONFIGS)
def test_old_names_with_a_config_in_the_header(name, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    unet, truth = adapted_unet(**CONFIGS[name])
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = _collate_lora_metadata({"unet": unet})
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert all(".lora.down." in key or ".lora.up." in key for key in load_file(file))
    assert_equals(file, truth)
    written = tmp_path / "kohya.safetensors"
    assert (
        main(
            ["convert", str(file), "--out", str(written), "--format", "kohya", "--dtype", "float32"]
        )
        == 0
    )
    if name != "patterns":  # padded to one rank there, the same change
        assert_equals(written, truth)


def test_a_config_that_contradicts_the_files_own_alpha(tmp_path):
    unet, _ = adapted_unet(lora_alpha=16)
    unet.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    config = json.dumps({"r": 4, "lora_alpha": 16})
    for alpha, wrong in ((16.0, False), (4.0, True)):
        tensors = load_file(file)
        stems = {key.rpartition(".lora_")[0] for key in tensors}
        tensors |= {f"{stem}.alpha": torch.tensor(alpha) for stem in stems}
        save_file(tensors, tmp_path / "both.safetensors", {"lora_adapter_metadata": config})
        if wrong:
            with pytest.raises(UserError, match=r"alpha gives scale 1, .* gives 4"):
                load_lora(tmp_path / "both.safetensors")
        else:
            load_lora(tmp_path / "both.safetensors")


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
@pytest.mark.parametrize("form", ["folder", "header"])
def test_initialisations_that_change_the_base_are_refused(init, form, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    unet = tiny.torch_unet(tiny.tiny_unet_config())
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], init_lora_weights=init)
    if form == "folder":
        get_peft_model(unet, config).save_pretrained(tmp_path)
        path = tmp_path
    else:
        unet.add_adapter(config)
        unet.save_lora_adapter(tmp_path)
        path = tmp_path / "pytorch_lora_weights.safetensors"
    assert (
        main(["convert", str(path), "--out", str(tmp_path / "out"), "--format", "diffusers"]) == 2
    )
    error = capsys.readouterr().err.strip()
    assert f"init_lora_weights '{init}' changes the base" in error and "\n" not in error


def test_every_field_of_peft_is_in_one_table():
    from peft import LoraConfig

    tables = (lora_config.HONOURED, lora_config.REFUSED, lora_config.HARMLESS)
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"init_lora_weights"}
    assert len(fields) > 30
    for name in fields:
        assert sum(name in table for table in tables) == 1, name
    default = LoraConfig().to_dict()
    lora_config.check_config("adapter", {**default, "peft_type": "LORA"})
    for name in lora_config.REFUSED - {"bias"}:
        with pytest.raises(UserError, match=f"{name} = .* is not supported"):
            lora_config.check_config("adapter", {name: [1]})
    with pytest.raises(UserError, match=r"field .new_in_peft. .* is unknown"):
        lora_config.check_config("adapter", {"new_in_peft": 2})


def test_the_second_text_encoders_folder_alone(tmp_path):
    key = "base_model.model.text_model.encoder.layers.31.self_attn.q_proj"
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    for folder, width in (("text_encoder_2", 8), ("anything", 1280)):
        (tmp_path / folder).mkdir()
        factors = {"lora_A": torch.ones(4, width), "lora_B": torch.ones(width, 4)}
        tensors = {f"{key}.{name}.weight": value for name, value in factors.items()}
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config))
        (site,) = load_lora(tmp_path / folder)[1].sites
        assert site.path.startswith("text_encoder_2.")
