import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import read_metadata, save_lora
from hyperlora_jax.lora_files.header import check, recognise
from tests.lora_files.conftest import random_lora

BLOCK = ".attentions.0.transformer_blocks.0."


def spec(*sites):
    return LoraSpec(tuple(LoraSite(*site) for site in sites))


@pytest.mark.parametrize(
    ("sites", "family", "evidence"),
    [
        ([("down_blocks.1" + BLOCK + "attn2.to_k", 768, 640, 1)], "sd1", "width 768"),
        ([("down_blocks.1" + BLOCK + "attn2.to_k", 1024, 640, 1)], "sd2", "width 1024"),
        ([("down_blocks.1" + BLOCK + "attn2.to_k", 2048, 640, 1)], "sdxl", "width 2048"),
        ([("down_blocks.1" + BLOCK + "attn2.to_k", 24, 64, 1)], "sd1", "undecidable"),
        ([("down_blocks.0" + BLOCK + "attn2.to_k", 2048, 640, 1)], "sd1", "undecidable"),
        ([("up_blocks.0" + BLOCK + "attn2.to_k", 24, 64, 1)], "sdxl", "up_blocks.0"),
        (
            [("down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", 64, 64, 1)],
            "sdxl",
            "transformer_blocks.1",
        ),
        ([("mid_block.attentions.0.proj_in", 64, 64, 1, "conv")], "sd1", "convolutions"),
        ([("mid_block.attentions.0.proj_in", 64, 64, 1)], "sd2", "linear layers"),
        (
            [("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 1024, 1024, 1)],
            "sd2",
            "text encoder of width 1024",
        ),
        (
            [("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", 8, 8, 1)],
            "sdxl",
            "text_encoder_2",
        ),
    ],
)
def test_structure_decides_and_widths_break_ties(sites, family, evidence):
    found, why = recognise(spec(*sites))
    assert found == family
    assert evidence in why
    assert check(None, spec(*sites)) == family
    assert check("sd2", spec(*sites)) == "sd2"
    with pytest.raises(UserError, match="family 'sd3' is unknown"):
        check("sd3", spec(*sites))


def test_headers_say_what_the_clients_look_for(tmp_path):
    sites = spec(("mid_block.resnets.0.conv1", 8, 8, 2, "conv", (3, 3)))
    wanted = {
        "sd1": ("sd_v1", "False", "stable-diffusion-v1/lora"),
        "sd2": ("sd_v2", "True", "stable-diffusion-v2-512/lora"),
        "sdxl": ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    }
    for family, (version, v2, architecture) in wanted.items():
        path = tmp_path / f"{family}.safetensors"
        save_lora(path, random_lora(sites), sites, family=family, metadata={"name": "anna"})
        texts = read_metadata(path)
        assert texts["ss_base_model_version"] == version
        assert texts["ss_v2"] == v2
        assert texts["modelspec.architecture"] == architecture
        assert (texts["ss_network_dim"], texts["ss_network_alpha"]) == ("2", "2")
        assert '"conv_dim": "2"' in texts["ss_network_args"]
        assert (texts["format"], texts["ss_output_name"]) == ("pt", "anna")
        assert not any("date" in key for key in texts)
    path = tmp_path / "v.safetensors"
    prediction = {"prediction_type": "v_prediction"}
    save_lora(path, random_lora(sites), sites, family="sd2", metadata=prediction)
    assert read_metadata(path)["ss_base_model_version"] == "sd_v2_v"
    save_lora(path, random_lora(sites), sites, "diffusers")
    assert not any(key.startswith("ss_") for key in read_metadata(path))
