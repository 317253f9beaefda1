"""Tensor names of the original single-file checkpoints of Stable Diffusion 1.x, 2.x and XL.

`translate` turns one name into the diffusers names that its tensor fills: a list, because
OpenCLIP fuses q, k and v into one `in_proj`. The UNet's blocks are numbered in one row there
(input_blocks, output_blocks); which is what follows from the layers per block.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import keys

# Exponential averages, training buffers, bookkeeping: nothing that a forward pass needs.
IGNORED = re.compile(
    r"^(model_ema\.|first_stage_model\.loss\.|betas$|alphas_cumprod|sqrt_|log_one_minus|posterior_"
    r"|logvar$|lvlb_weights|scale_factor$|global_step$|v_pred$|ztsnr$|denoiser\.sigmas$|cond_stage_model\.logit_scale"
    r"|.*\.logit_scale$|.*\.attn_mask$|.*\.position_ids$|model\.denoiser)"
)
_VAE = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
)
_OPEN_CLIP = (
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.(\d+)\.ln_([12])\.", r"text_model.encoder.layers.\1.layer_norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.", r"text_model.encoder.layers.\1.self_attn."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"text_model.encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"text_model.encoder.layers.\1.mlp.fc2."),
)
_PREFIXES = (
    ("model.diffusion_model.", "unet", "unet"),
    ("first_stage_model.", "vae", "vae"),
    ("cond_stage_model.transformer.", "text_encoder", "clip"),
    ("cond_stage_model.model.", "text_encoder", "open_clip"),
    ("conditioner.embedders.0.transformer.", "text_encoder", "clip"),
    ("conditioner.embedders.1.model.", "text_encoder_2", "open_clip"),
)


class Target(NamedTuple):
    """One diffusers tensor: `third` 0, 1, 2 cuts q, k, v out of the rows; `transpose` turns it."""

    component: str
    name: str
    third: int | None = None
    transpose: bool = False


def translate(name: str, configs: Mapping[str, Json]) -> list[Target]:
    """Targets of an original tensor; [] for one that is ignored.

    `configs` are the components' config.json dicts. Raises UserError for an unknown name.
    """
    if IGNORED.search(name):
        return []
    for prefix, component, kind in _PREFIXES:
        if name.startswith(prefix):
            inner = name[len(prefix) :]
            if kind == "unet":
                return [Target(component, _unet_name(name, inner, configs["unet"]))]
            if kind == "vae":
                return [Target(component, _vae_name(inner, configs["vae"]))]
            if kind == "clip":
                return [Target(component, inner)]
            return _open_clip_targets(inner, component, configs[component])
    raise UserError(f"tensor {name!r} belongs to no known part of Stable Diffusion 1.x, 2.x or XL")


def _unet_name(full: str, inner: str, config: Json) -> str:
    layer, _, number = inner.rpartition(".")
    path = keys.from_ldm(layer, config.get("layers_per_block", 2), norms=True)
    if path is None:
        raise UserError(f"tensor {full!r} is no part of a known UNet layout")
    return f"{path}.{number}"


def _vae_name(inner: str, config: Json) -> str:
    last = len(config["block_out_channels"]) - 1

    def up(match: re.Match) -> str:  # the decoder counts its levels from fine to coarse
        part = "resnets" if match[2] == "block" else "upsamplers"
        index = f"{match[3]}." if match[3] else ""
        return f".up_blocks.{last - int(match[1])}.{part}.{index or '0.'}"

    inner = re.sub(r"\.up\.(\d+)\.(block|upsample)\.(?:(\d+)\.)?", up, inner)
    for pattern, replacement in _VAE:
        inner = re.sub(pattern, replacement, inner)
    return inner


def _open_clip_targets(inner: str, component: str, config: Json) -> list[Target]:
    layer = re.match(r"transformer\.resblocks\.(\d+)\.", inner)
    if layer and int(layer[1]) >= config["num_hidden_layers"]:
        return []  # SD 2.x reads the penultimate layer: its last is never used
    is_projection = inner == "text_projection"
    if is_projection and config.get("architectures") != ["CLIPTextModelWithProjection"]:
        return []
    for pattern, replacement in _OPEN_CLIP:
        inner = re.sub(pattern, replacement, inner)
    fused = re.match(r"(.*)\.in_proj_(weight|bias)$", inner)
    if fused:
        return [
            Target(component, f"{fused[1]}.{part}_proj.{fused[2]}", third)
            for third, part in enumerate("qkv")
        ]
    return [Target(component, inner, transpose=is_projection)]
