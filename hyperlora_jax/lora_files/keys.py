"""Names: file keys <-> (diffusers module path, role), for every format that is read.

Forms of the UNet path P = down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q:
    F1  unet.P.lora_A.weight                         diffusers / PEFT keys
    F2  base_model.model.P.lora_A[.adapter].weight   PEFT directory, weights2weights
    F3  unet.<..>.attn1.processor.to_q_lora.down.weight, unet.P.lora.down.weight   old diffusers
    F4  lora_unet_<P with _>.lora_down.weight        kohya, diffusers names
    F5  lora_unet_input_blocks_1_1_....              kohya, LDM / sgm names
    F6  diffusion_model.input_blocks.1.1.....lora_A.weight   ComfyUI generic
"""

import functools
import re
from collections.abc import Iterable, Mapping

from hyperlora_jax.lora.sites import TEXT_ENCODERS

# What follows a module path in a key -> role. The first match wins; roles outside `PLAIN`
# name kinds that are no plain LoRA.
_ROLES = (
    (r"\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)(?:\.[\w-]+)?\.weight$", "down"),
    (r"\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)(?:\.[\w-]+)?\.weight$", "up"),
    (r"_lora\.down\.weight$", "down"),
    (r"_lora\.up\.weight$", "up"),
    (r"\.lora_(?:A|down)$", "down"),
    (r"\.lora_(?:B|up)$", "up"),
    (r"\.alpha$", "alpha"),
    (r"\.scale$", "scale"),
    (r"\.(?:hada_w[12]_[ab]|hada_t[12])$", "LoHa"),
    (r"\.lokr_(?:w[12](?:_[ab])?|t2)$", "LoKr"),
    (r"\.(?:dora_scale|lora_magnitude_vector(?:\.[\w-]+)?(?:\.weight)?)$", "DoRA"),
    (r"\.lora_mid\.weight$", "core of a convolution (lora_mid)"),
    (r"\.(?:diff|diff_b)$", "full difference (diff)"),
    (r"\.(?:set_weight|reshape_weight)$", "a replaced or reshaped weight (set_weight)"),
    (r"\.(?:oft_blocks|oft_diag|oft_[rR]|boft_\w+)(?:\.[\w-]+)?(?:\.weight)?$", "OFT"),
    (r"\.(?:on_input|ia3_l(?:\.[\w-]+)?)$", "IA3"),
    (r"\.(?:w_norm|b_norm)$", "norm difference (w_norm)"),
    (r"\.lora_(?:A|B|down|up)(?:\.[\w-]+)?\.bias$", "LoRA with a bias"),
    (r"\.(?:vera_lambda_[bd]|glora_\w+|[ab][12]\.weight)$", "GLoRA or VeRA"),
)
ROLES = tuple((re.compile(pattern), role) for pattern, role in _ROLES)
PLAIN = ("down", "up", "alpha", "scale")
JOINED = ("core of a convolution (lora_mid)",)  # times down it is a down factor
CONVERTED = ("LoHa", "LoKr", "DoRA")  # to plain LoRAs, where there is a base
DIFFERENCES = ("full difference (diff)", "norm difference (w_norm)", "LoRA with a bias")

# Grammar of UNet module paths with every separator written "_" (F4); groups are re-joined by ".".
_ATTENTION = (
    r"(proj_in|proj_out)|(transformer_blocks)_(\d+)_(?:(attn[12])_(to_q|to_k|to_v|to_out_0)"
    r"|(ff)_(net_0_proj|net_2))"
)
_RESNET = r"(conv1|conv2|time_emb_proj|conv_shortcut)"
_FLAT = tuple(
    re.compile(rf"^(?:{rule})$")
    for rule in (
        rf"(?:(down_blocks|up_blocks)_(\d+)|(mid_block))_(attentions)_(\d+)_(?:{_ATTENTION})",
        rf"(?:(down_blocks|up_blocks)_(\d+)|(mid_block))_(resnets)_(\d+)_{_RESNET}",
        r"(down_blocks|up_blocks)_(\d+)_(downsamplers|upsamplers)_(\d+)_(conv)",
        r"(time_embedding|add_embedding)_(linear_[12])",
        r"(conv_in|conv_out)",
    )
)
_TEXT_FLAT = re.compile(
    r"^text_model_encoder_layers_(\d+)_(?:(self_attn)_(q_proj|k_proj|v_proj|out_proj)"
    r"|(mlp)_(fc[12]))$"
)
_TEXT_PREFIX = {  # the first that fits
    "lora_te_0_transformer_": "text_encoder.",
    "lora_te_": "text_encoder.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
}
# ComfyUI's names of the text encoders.
_TEXT_DOTTED = re.compile(r"^(?:text_encoders\.)?clip_([lg])\.(?:transformer\.)?")
_CLIPS = {"l": "text_encoder", "g": "text_encoder_2"}
# What wrappers put around a model: torch.compile, DataParallel, PEFT.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|base_model\.model)\.")
_LDM_FLAT = re.compile(r"^(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_")
_LDM_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_LDM_NORMS = {"in_layers.0": "norm1", "out_layers.0": "norm2"}
_LDM_FIXED = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_TO_FIXED = {value: key for key, value in _LDM_FIXED.items()}
_TO_RESNET = {value: key for key, value in _LDM_RESNET.items()}
_ATTENTION_DOTTED = re.compile(
    r"^(?:proj_in|proj_out|transformer_blocks\.\d+\."
    r"(?:attn[12]\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2)))$"
)
TRANSFORMER_ONLY = re.compile(
    r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks|joint_blocks|"
    r"joint_transformer_blocks|double_layers|context_refiner|noise_refiner)[._]"
    r"|^(transformer|lora_transformer)[._]|^diffusion_model\.(blocks|layers)\."
)


@functools.lru_cache(maxsize=1 << 16)
def split_role(key: str) -> tuple[str, str] | None:
    """(stem, role) of a key; None when the ending is none that belongs to a LoRA file."""
    for pattern, role in ROLES:
        if match := pattern.search(key):
            stem = key[: match.start()]
            return (_unprocessed(stem, key), role) if key[match.start()] == "_" else (stem, role)
    return None


def other_layers(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{stem: {part: key}} of a file's layers that are no plain LoRA, of LoHa, LoKr and DoRA."""
    groups: dict[str, dict[str, str]] = {}
    for key in names:
        if found := split_role(key):
            stem, role = found
            part = role if role in PLAIN else key[len(stem) + 1 :]
            groups.setdefault(stem, {})["magnitude" if role == "DoRA" else part] = key
    return {stem: group for stem, group in groups.items() if other_kind(group)}


def other_kind(parts: Mapping[str, str]) -> str:
    """ "LoHa", "LoKr" or "DoRA", by the tensors of a layer; "" for a plain LoRA."""
    if "magnitude" in parts:
        return "DoRA"
    start = next((part[:4] for part in parts if part[:5] in ("hada_", "lokr_")), "")
    return {"hada": "LoHa", "lokr": "LoKr", "": ""}[start]


def _unprocessed(stem: str, key: str) -> str:
    """Old attention names: "...attn1.processor.to_out" -> "...attn1.to_out.0" (UNet only)."""
    stem = stem.replace(".processor.", ".")
    return f"{stem}.0" if stem.endswith(".to_out") else stem


@functools.lru_cache(maxsize=1 << 16)
def canonical_path(stem: str, layers_per_block: int = 2) -> str | None:
    """Diffusers path of a key's stem, with "text_encoder." for text encoders; None if unknown."""
    stem = _WRAPPERS.sub("", stem)
    if clip := _TEXT_DOTTED.match(stem):
        return _text_dotted(stem[clip.end() :], _CLIPS[clip[1]])
    for prefix, component in _TEXT_PREFIX.items():
        if stem.startswith(prefix):
            return _text_flat(stem.removeprefix(prefix), component)
    for prefix in ("lora_unet_", "lycoris_unet_", "lycoris_"):
        if stem.startswith(prefix):
            return _unet_flat(stem.removeprefix(prefix), layers_per_block)
    for component in TEXT_ENCODERS:
        if stem.startswith(component + "."):
            return _text_dotted(stem.removeprefix(component + "."), component)
    for prefix in ("diffusion_model.", "unet."):
        stem = stem.removeprefix(prefix)
    if stem.startswith(("text_model.", "encoder.layers.")):
        return _text_dotted(stem, "text_encoder")
    stem = stem.replace(".processor.", ".")
    if _LDM_FLAT.match(stem.replace(".", "_")):
        return from_ldm(stem, layers_per_block)
    flat = stem.replace(".", "_")
    path = _unflatten_unet(flat)
    return path if path is not None and path.replace(".", "_") == flat else None


def is_layer(path: str) -> bool:
    """Whether this is the path of a layer that LoRA files have a name for."""
    return canonical_path(path) == path


def _text_dotted(path: str, component: str) -> str | None:
    """Puts back the "text_model." that transformers 5 leaves out."""
    path = path.removeprefix("text_model.").replace(".processor.", ".")
    if path.endswith(".to_out.0") or re.search(r"\.to_[qkv]$", path):
        path = re.sub(r"\.to_out\.0$", ".out_proj", path)
        path = re.sub(r"\.to_([qkv])$", r".\1_proj", path)
    flat = "text_model_" + path.replace(".", "_")
    return _text_flat(flat, component + ".")


def _text_flat(flat: str, component: str) -> str | None:
    if flat == "text_projection" or flat == "text_model_text_projection":
        return component + "text_projection"
    # transformers 5 leaves "text_model_" out.
    match = _TEXT_FLAT.match(flat) or _TEXT_FLAT.match(f"text_model_{flat}")
    if not match:
        return None
    layer, *rest = (group for group in match.groups() if group is not None)
    return ".".join([component + "text_model.encoder.layers", layer, *rest])


def _unet_flat(flat: str, layers_per_block: int) -> str | None:
    if not _LDM_FLAT.match(flat):
        return _unflatten_unet(flat)
    match = re.match(
        r"^(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)$|^(middle_block)_(\d+)_(.+)$", flat
    )
    if not match:
        fixed = (path for ldm, path in _LDM_FIXED.items() if ldm.replace(".", "_") == flat)
        return next(fixed, None)
    groups = [group for group in match.groups() if group is not None]
    tail = groups[-1]
    for dotted in (*_LDM_RESNET, "op", "conv"):
        if tail == dotted.replace(".", "_"):
            return from_ldm(".".join([*groups[:-1], dotted]), layers_per_block)
    attention = _unflatten_unet(f"mid_block_attentions_0_{tail}")
    if attention is None:
        return None
    inner = attention.removeprefix("mid_block.attentions.0.")
    return from_ldm(".".join([*groups[:-1], inner]), layers_per_block)


def _unflatten_unet(flat: str) -> str | None:
    for rule in _FLAT:
        if match := rule.match(flat):
            groups = [group for group in match.groups() if group is not None]
            if groups[-1] in ("to_out_0", "net_2"):
                groups[-1] = groups[-1].replace("_0", ".0").replace("_2", ".2")
            elif groups[-1] == "net_0_proj":
                groups[-1] = "net.0.proj"
            return ".".join(groups)
    return None


def from_ldm(path: str, layers_per_block: int = 2, norms: bool = False) -> str | None:
    """Diffusers path of an LDM / sgm path ("input_blocks.1.1.proj_in"), of a norm only with
    `norms`; None if it has none."""
    if path in _LDM_FIXED:
        return _LDM_FIXED[path]
    if norms and path == "out.0":
        return "conv_norm_out"
    match = re.match(r"^(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)$", path)
    if match:
        side, number, slot, inner = match[1], int(match[2]), int(match[3]), match[4]
        if side == "input_blocks":
            block, layer = divmod(number - 1, layers_per_block + 1)
            if number < 1:
                return None
            if inner == "op":
                return f"down_blocks.{block}.downsamplers.0.conv"
            head = f"down_blocks.{block}"
        else:
            block, layer = divmod(number, layers_per_block + 1)
            if inner == "conv":
                return f"up_blocks.{block}.upsamplers.0.conv"
            head = f"up_blocks.{block}"
        return _ldm_inner(head, slot, layer, inner, norms)
    match = re.match(r"^middle_block\.([012])\.(.+)$", path)
    if match:
        slot = int(match[1])
        return _ldm_inner("mid_block", slot % 2, slot // 2, match[2], norms)
    return None


def _ldm_inner(head: str, slot: int, layer: int, inner: str, norms: bool) -> str | None:
    own = _LDM_RESNET | _LDM_NORMS if norms else _LDM_RESNET
    if slot == 0 and inner in own:
        return f"{head}.resnets.{layer}.{own[inner]}"
    if slot == 1 and (norms or _ATTENTION_DOTTED.match(inner)):
        return f"{head}.attentions.{layer}.{inner}"
    return None


def to_ldm(path: str, layers_per_block: int = 2) -> str | None:
    """LDM / sgm path of a diffusers UNet path, of a model with attention in all up blocks that
    have upsamplers, as SDXL; None when there is no such name."""
    if path in _TO_FIXED:
        return _TO_FIXED[path]
    stride = layers_per_block + 1
    match = re.match(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)$", path)
    if match:
        block, kind, layer, inner = int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{stride * block + stride}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{stride * block + stride - 1}.2.conv"
        number = stride * block + layer
        head = f"input_blocks.{number + 1}" if match[1] == "down" else f"output_blocks.{number}"
        slots = {"resnets": f"{head}.0", "attentions": f"{head}.1"}
    else:
        match = re.match(r"^mid_block\.(\w+)\.(\d+)\.(.+)$", path)
        if not match:
            return None
        kind, layer, inner = match[1], int(match[2]), match[3]
        slots = {"resnets": f"middle_block.{2 * layer}", "attentions": "middle_block.1"}
    if kind not in slots:
        return None
    inner = _TO_RESNET.get(inner) if kind == "resnets" else inner
    return None if inner is None else f"{slots[kind]}.{inner}"
