import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.networks.autoencoder import vae_from_config
from hyperlora_jax.stable_diffusion.networks.blocks import check_remat
from hyperlora_jax.stable_diffusion.networks.clip_text import text_model_from_config
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config

from .conftest import tiny_text_config, tiny_unet_config, tiny_vae_config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unheard_of": 1}, "UNet config: key 'unheard_of' .value 1. is unknown"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep' is not supported"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention"),
        ({"addition_embed_type": "image"}, "addition_embed_type = 'image'"),
        ({"addition_embed_type": "text_time"}, "input_dim is None, expected more than 6 x"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 56,
            },
            r"input_dim is 56, expected more than 6 x addition_time_embed_dim \(256\)",
        ),
        ({"cross_attention_dim": [8, 16]}, "cross_attention_dim"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types has 1 values, expected 2"),
        ({"attention_head_dim": [1, 2, 3]}, "attention_head_dim has 3 values, expected 2"),
        ({"transformer_layers_per_block": [[1], 1]}, "expected reverse_transformer_layers_per"),
        (
            {
                "transformer_layers_per_block": [[1, 2], 1],
                "reverse_transformer_layers_per_block": [1, [1, 2]],
            },
            "transformer_layers_per_block has 2 values, expected 1",
        ),
    ],
)
def test_unet_config_is_read_strictly(changes, message):
    with pytest.raises(UserError, match=message):
        unet_from_config(tiny_unet_config(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "AttnDownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types has 1 values, expected 3"),
        ({"spectral": True}, "autoencoder config: key 'spectral'"),
    ],
)
def test_autoencoder_config_is_read_strictly(changes, message):
    with pytest.raises(UserError, match=message):
        vae_from_config(tiny_vae_config(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "swiglu"}, "hidden_act = 'swiglu'"),
        ({"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ({"model_type": "bert"}, "model_type = 'bert' is not supported"),
        ({"rope": 1}, "text encoder config: key 'rope'"),
    ],
)
def test_text_encoder_config_is_read_strictly(changes, message):
    with pytest.raises(UserError, match=message):
        text_model_from_config(tiny_text_config(**changes))


def test_null_is_fine_and_the_config_is_kept():
    config = tiny_unet_config(class_embed_type=None, time_cond_proj_dim=None, norm_eps=None)
    assert unet_from_config(config).config == config
    assert vae_from_config(tiny_vae_config(shift_factor=None)).values["shift_factor"] is None


def test_unknown_remat_policy_is_named():
    with pytest.raises(UserError, match="remat = 'some'"):
        check_remat("some")
