"""Configs of a single file's parts, told from its tensors' shapes: it carries no config.json.

What shapes cannot tell is the same in all files of the original layout: 32 groups in norms, heads
64 wide (8 of them in 1.x), the scaling of the latents.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

from hyperlora_jax.array_types import Json, JsonDict
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.lora_files.base_files import is_pickled, read_pickle

Shapes = Mapping[str, tuple[int, ...]]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
# (component, where it is, whether OpenCLIP named its tensors)
_TEXTS = (
    ("text_encoder", "cond_stage_model.transformer.", False),
    ("text_encoder", "cond_stage_model.model.", True),
    ("text_encoder", "conditioner.embedders.0.transformer.", False),
    ("text_encoder_2", "conditioner.embedders.1.model.", True),
)
SCHEDULER: Json = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def is_base(path: str | Path) -> bool:
    """Whether a path is a file with a whole UNet (and no LoRA)."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".ckpt") or not path.is_file():
        return False
    names = dict(read_pickle(path)) if is_pickled(path) else safetensors_io.read_entries(path)
    return any(name.startswith(UNET) for name in names)


def configs_of(shapes: Shapes) -> dict[str, JsonDict]:
    """{component: config.json} of the parts that are there; the UNet always is.

    Args:
        shapes: {tensor name of the original layout: shape}.

    Raises:
        UserError: no UNet of Stable Diffusion 1.x, 2.x or XL.
    """
    texts = {
        name: config
        for name, prefix, open_clip in _TEXTS
        if (config := _text(_inside(shapes, prefix), name, open_clip))
    }
    pooled = texts.get("text_encoder_2", {}).get("projection_dim")
    unet = _unet(_inside(shapes, UNET), pooled)
    configs = {"unet": unet, "vae": _vae(_inside(shapes, VAE), unet), **texts}
    return {name: config for name, config in configs.items() if config}


def _inside(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}


def _unet(shapes: Shapes, pooled: int | None) -> Json:
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    if not contexts or "input_blocks.0.0.weight" not in shapes:
        raise UserError(
            f"no cross-attention under {UNET}, expected an original Stable Diffusion 1.x, 2.x or "
            "XL file"
        )
    levels = _levels(shapes)
    channels, size = [width for width, _ in levels], len(levels[0][1])
    down = [depths for _, depths in levels]
    rows = itertools.takewhile(
        lambda k: f"output_blocks.{k}.0.in_layers.2.weight" in shapes, itertools.count()
    )
    up_rows = [_depth(shapes, f"output_blocks.{k}.1.") for k in rows]
    up = [up_rows[k : k + size + 1] for k in range(0, len(up_rows), size + 1)]
    mid = _depth(shapes, "middle_block.1.")
    if {len(depths) for depths in down} != {size} or [len(d) for d in up] != [size + 1] * len(down):
        raise UserError("the UNet's levels have different numbers of layers, expected one")
    if mid is not None and down[-1][0] not in (None, mid):
        raise UserError(f"the UNet's middle has {mid} transformer blocks, expected {down[-1][0]}")
    linear = any(len(s) == 2 for name, s in shapes.items() if name.endswith(".1.proj_in.weight"))
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": size,
        "down_block_types": [f"{_kind(depths)}DownBlock2D" for depths in down],
        "up_block_types": [f"{_kind(depths)}UpBlock2D" for depths in up],
        "mid_block_type": "UNetMidBlock2D" if mid is None else "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": [
            *(_short(depths, 1) for depths in down[:-1]),
            _short(down[-1], mid or 1),
        ],
        "attention_head_dim": [max(1, width // 64) for width in channels] if linear else 8,
        "use_linear_projection": linear,
        "cross_attention_dim": contexts[0],
    }
    reverse = [_short(depths, 1) for depths in up]
    if any(isinstance(d, list) for d in (*reverse, *config["transformer_layers_per_block"])):
        config["reverse_transformer_layers_per_block"] = reverse
    if "label_emb.0.0.weight" in shapes:
        width = shapes["label_emb.0.0.weight"][1]
        sizes, rest = divmod(width - (pooled or 0), 6)
        config |= {
            "sample_size": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": sizes if pooled and not rest else 256,
            "projection_class_embeddings_input_dim": width,
        }
    return config


def _levels(shapes: Shapes) -> list[tuple[int, list[int | None]]]:
    """[(width, depths of the layers)] of the down blocks."""
    levels: list[tuple[int, list[int | None]]] = []
    begins = True
    for k in itertools.count(1):
        row = f"input_blocks.{k}."
        if f"{row}0.op.weight" in shapes:
            begins = True
            continue
        weight = shapes.get(f"{row}0.in_layers.2.weight")
        if weight is None:
            return levels
        if begins:
            levels.append((weight[0], []))
        levels[-1][1].append(_depth(shapes, f"{row}1."))
        begins = False
    return levels


def _depth(shapes: Shapes, transformer: str) -> int | None:
    """Blocks of a transformer; None without one."""
    if f"{transformer}proj_in.weight" not in shapes:
        return None
    blocks = re.compile(re.escape(transformer) + r"transformer_blocks\.(\d+)\.")
    return len({match[1] for name in shapes if (match := blocks.match(name))})


def _kind(depths: list[int | None]) -> str:
    return "" if None in depths else "CrossAttn"


def _short(depths: list[int | None], absent: int) -> int | list[int]:
    """One number where all layers have it."""
    known = [absent if depth is None else depth for depth in depths]
    return known[0] if len(set(known)) == 1 else known


def _vae(shapes: Shapes, unet: Json) -> Json | None:
    widths = _numbered(shapes, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    if not widths or "decoder.conv_in.weight" not in shapes:
        return None
    xl = "addition_embed_type" in unet
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": len(
            _numbered(shapes, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
        ),
        "norm_num_groups": 32,
        "sample_size": 8 * unet["sample_size"],
        "scaling_factor": 0.13025 if xl else 0.18215,
    }


def _text(shapes: Shapes, name: str, open_clip: bool) -> Json | None:
    if open_clip:
        embeddings, places = "token_embedding.weight", "positional_embedding"
        layer, wide = r"transformer\.resblocks\.(\d+)\.", r"mlp\.c_fc\.weight"
    else:
        shapes = {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
        embeddings = "embeddings.token_embedding.weight"
        places = "embeddings.position_embedding.weight"
        layer, wide = r"encoder\.layers\.(\d+)\.", r"mlp\.fc1\.weight"
    inner = _numbered(shapes, layer + wide)
    if not inner or not {embeddings, places} <= shapes.keys():
        return None
    vocabulary, width = shapes[embeddings]
    projects = name == "text_encoder_2"
    return {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner[0],
        "max_position_embeddings": shapes[places][0],
        "num_attention_heads": max(1, width // 64),
        # 2.x reads the state before the last layer, which diffusers' layout leaves out.
        "num_hidden_layers": len(inner) - (open_clip and not projects),
        "projection_dim": shapes.get("text_projection", (0, width))[1],
        "eos_token_id": 2,
    }


def _numbered(shapes: Shapes, pattern: str) -> list[int]:
    """First sizes of the tensors whose whole name fits, in the order of the number in it."""
    sizes = {int(m[1]): s[0] for name, s in shapes.items() if (m := re.fullmatch(pattern, name))}
    return [sizes[number] for number in sorted(sizes)]
