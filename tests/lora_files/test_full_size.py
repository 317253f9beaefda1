"""Key sets of the real architectures, built by diffusers on the meta device (no weights)."""

import pytest

from hyperlora_jax.lora.sites import spec_from_shapes
from hyperlora_jax.lora_files import keys
from hyperlora_jax.lora_files.header import recognise
from hyperlora_jax.lora_files.writing import kohya_names
from tests.lora_files.conftest import shapes_of

FULL = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# (modules, numbers of one LoRA of rank 1) by preset
COUNTS = {
    "sd1": {
        "w2w": (64, 99_648),
        "attn-qkvo": (128, 199_296),
        "attn-ff": (192, 423_936),
        "all": (278, 1_050_816),
        "": (282, 1_058_216),
    },
    "sd2": {
        "w2w": (64, 103_744),
        "attn-qkvo": (128, 207_488),
        "attn-ff": (192, 432_128),
        "all": (278, 1_059_008),
        "": (282, 1_066_408),
    },
    "sdxl": {
        "w2w": (280, 725_760),
        "attn-qkvo": (560, 1_451_520),
        "attn-ff": (722, 2_659_840),
        "all": (788, 3_074_240),
        "": (794, 3_088_296),
    },
}


@pytest.fixture(scope="module", params=list(FULL))
def shapes(request):
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL[request.param])
    return request.param, shapes_of(unet)


def test_counts_names_and_recognition(shapes):
    family, tree = shapes
    for preset, wanted in COUNTS[family].items():
        spec = spec_from_shapes(tree, preset or [""], 1)
        assert (len(spec), spec.num_parameters) == wanted
        assert recognise(spec)[0] == family
    every = spec_from_shapes(tree, [""], 1)
    for path in [site.path for site in every]:
        ldm = keys.to_ldm(path)
        assert keys.from_ldm(ldm) == path
        for stem in (
            f"lora_unet_{path.replace('.', '_')}",
            f"lora_unet_{ldm.replace('.', '_')}",
            f"diffusion_model.{ldm}",
            f"unet.{path}",
            f"base_model.model.{path}",
            path,
        ):
            assert keys.canonical_path(stem) == path
    names = set(kohya_names(every, family, 2).values())
    assert len(names) == len(every)
    known = {
        "sd1": "lora_unet_down_blocks_2_downsamplers_0_conv",
        "sd2": "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "sdxl": "lora_unet_output_blocks_5_2_conv",
    }
    assert known[family] in names


def test_known_ldm_names():
    pairs = {
        "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
        "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.3.attentions.2.proj_out": "output_blocks.11.1.proj_out",
        "up_blocks.1.resnets.2.time_emb_proj": "output_blocks.5.0.emb_layers.1",
    }
    for path, ldm in pairs.items():
        assert keys.to_ldm(path) == ldm
        assert keys.from_ldm(ldm) == path
    assert keys.from_ldm("output_blocks.2.1.conv") == "up_blocks.0.upsamplers.0.conv"  # SD 1 and 2
    for nonsense in ("input_blocks.1.0.proj_in", "middle_block.3.op", "output_blocks.1.0.x", "a.b"):
        assert keys.from_ldm(nonsense) is None
    for nonsense in ("conv_norm_out", "down_blocks.0.norms.0.x", "mid_block.samplers.0.conv"):
        assert keys.to_ldm(nonsense) is None
