"""Tiny models with the block structure, and so the real module names, of the three families."""

import jax
import numpy as np
import pytest

from hyperlora_jax.lora.factors import is_site
from hyperlora_jax.lora.sites import LoraSpec, module_path, spec_from_shapes

TINY_UNETS = {
    "sd1": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sd2": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}
COMMON = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "layers_per_block": 2,
}


def torch_modules(family):
    """{"unet", "text_encoder", …}: random PyTorch modules of a family."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(7)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 16,
        "projection_dim": 32,
    }
    config = COMMON | {"attention_head_dim": 4} | TINY_UNETS[family]
    modules = {"unet": UNet2DConditionModel(**config)}
    modules["text_encoder"] = CLIPTextModel(CLIPTextConfig(**sizes))
    if family == "sdxl":
        modules["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**sizes))
    return {name: module.eval() for name, module in modules.items()}


def shapes_of(module, text=False):
    """Flax-like parameter shapes of a PyTorch module's linear and convolution layers."""
    tree = {}
    for name, value in module.named_parameters():
        if not name.endswith(".weight") or value.ndim not in (2, 4) or "embedding.w" in name:
            continue
        path = name.removesuffix(".weight")
        if text and not path.startswith("text_model.") and path != "text_projection":
            path = "text_model." + path
        order = (1, 0) if value.ndim == 2 else (2, 3, 1, 0)
        node = tree
        for part in module_path(path):
            node = node.setdefault(part, {})
        shape = tuple(value.shape[axis] for axis in order)
        node["kernel"] = jax.ShapeDtypeStruct(shape, np.float32)
    return tree


def spec_of(modules, preset="all", rank=4, text=True):
    specs = [spec_from_shapes(shapes_of(modules["unet"]), preset, rank)]
    for name in sorted(set(modules) - {"unet"}) if text else ():
        shapes = shapes_of(modules[name], text=True)
        specs.append(spec_from_shapes(shapes, "text", rank, prefix=f"{name}."))
    return LoraSpec(tuple(site for spec in specs for site in spec))


def random_lora(spec, seed=0, size=0.2):
    """A LoRA tree of normal numbers, float32 numpy."""
    from hyperlora_jax.lora.factors import zeros

    random = np.random.default_rng(seed)

    def fill(pair):
        return {
            side: (size * random.standard_normal(pair[side].shape)).astype(np.float32)
            for side in ("down", "up")
        }

    return jax.tree.map(fill, zeros(spec), is_leaf=is_site)


@pytest.fixture(scope="session", params=["sd1", "sd2", "sdxl"])
def family(request):
    return request.param


@pytest.fixture(scope="session")
def modules(family):
    return torch_modules(family)


@pytest.fixture(scope="session")
def sd1_modules():
    return torch_modules("sd1")
