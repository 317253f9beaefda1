"""Which tool loads which file, told beforehand from rules; none of the tools is needed.

The rules are what was measured with diffusers 0.42 and 0.33, PEFT, kohya sd-scripts, LyCORIS,
ComfyUI and stable-diffusion.cpp, and read in A1111's source, for each form of keys.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files.family import Family

Form = Literal[
    "kohya", "kohya-ldm", "diffusers", "old-diffusers", "comfy", "peft", "weights2weights"
]
TOOLS = (
    "diffusers",
    "diffusers 0.33",
    "PEFT",
    "kohya sd-scripts",
    "LyCORIS",
    "ComfyUI",
    "A1111",
    "stable-diffusion.cpp",
)
EDGE = re.compile(r"^(conv_in|conv_out|time_embedding|add_embedding)\b")
_LDM = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed\.|label_emb)[._]")
_OTHER_NAMES = "its key names are not those the tool looks for"


@dataclasses.dataclass(frozen=True)
class ToolReport:
    """How one tool takes the file: `status` full, part, none or untested, with the reason."""

    tool: str
    status: Literal["full", "part", "none", "untested"]
    num_sites: int
    lost: tuple[str, ...]
    reason: str


def form_of(keys: Iterable[str]) -> Form:
    """Form of a file's keys, decided by its UNet keys when it has any."""
    names = [key for key in keys if not key.startswith(("lora_te", "text_encoder"))] or list(keys)
    joined = "\n".join(names)
    if ".identity1." in joined:
        return "weights2weights"
    if "base_model.model." in joined:
        return "peft"
    if any(name.startswith("diffusion_model.") for name in names):
        return "comfy"
    if any(name.startswith("lora_") for name in names):
        return "kohya-ldm" if _LDM.search(joined) else "kohya"
    return (
        "old-diffusers" if re.search(r"[._]lora(_linear_layer)?\.down\.", joined) else "diffusers"
    )


def written_form(format: str, family: Family) -> Form:
    """Form of a file that `save_lora` writes."""
    if format == "kohya":
        return "kohya-ldm" if family == "sdxl" else "kohya"
    return format  # type: ignore[return-value]


def report(spec: LoraSpec, family: Family, form: Form) -> list[ToolReport]:
    """One row for each tool, for a file in normal form."""
    return [_tool_report(tool, spec, family, form) for tool in TOOLS]


def _tool_report(tool: str, spec: LoraSpec, family: Family, form: Form) -> ToolReport:
    if family == "sdxl" and (tool, form) in _UNTESTED_XL:
        return ToolReport(tool, "untested", 0, (), "never tried with SDXL files of this form")
    reasons = {site.path: _loss(tool, site, spec, family, form) for site in spec.sites}
    lost = tuple(path for path, reason in reasons.items() if reason)
    kept = len(spec) - len(lost)
    status = "full" if not lost else "part" if kept else "none"
    why = "; ".join(sorted({reason for reason in reasons.values() if reason}))
    return ToolReport(tool, status, kept, lost, why)


_UNTESTED_XL = {
    ("LyCORIS", "kohya-ldm"),
    ("LyCORIS", "kohya"),
    ("stable-diffusion.cpp", "kohya"),
    ("stable-diffusion.cpp", "kohya-ldm"),
}


def _loss(tool: str, site: LoraSite, spec: LoraSpec, family: Family, form: Form) -> str:
    """Why a tool does not apply a site; "" when it does."""
    if tool == "PEFT":
        return "" if form in ("peft", "weights2weights") else "no adapter folder"
    if form in ("peft", "weights2weights"):
        return "an adapter folder is for PEFT only"
    if tool.startswith("diffusers"):
        return _diffusers(tool, site, family, form)
    text = site.component != "unet"
    if tool == "ComfyUI":
        if form == "diffusers" and ".attn" in site.path:
            return "attention keys in diffusers form are not loaded"
        if form == "old-diffusers" and text and "self_attn" in site.path:
            return "old text encoder attention keys are not loaded"
        return ""
    if tool == "A1111":
        return _a1111(site, spec, family, form)
    if tool == "stable-diffusion.cpp":
        return _sdcpp(site, form)
    usable = form == "kohya" or (tool == "kohya sd-scripts" and family == "sdxl")
    if not usable or form not in ("kohya", "kohya-ldm"):
        return _OTHER_NAMES
    if tool == "kohya sd-scripts" and EDGE.match(site.path):
        return "layers outside attention, resnets and samplers are ignored"
    return ""


def _diffusers(tool: str, site: LoraSite, family: Family, form: Form) -> str:
    if form == "comfy" or (form == "kohya-ldm" and family != "sdxl"):
        return _OTHER_NAMES
    if form == "kohya" and family == "sdxl" and site.path.startswith("add_embedding"):
        return "add_embedding is dropped from kohya files"
    if tool != "diffusers" and form.startswith("kohya") and EDGE.match(site.path):
        return "layers outside attention, resnets and samplers are dropped"
    return ""


def _a1111(site: LoraSite, spec: LoraSpec, family: Family, form: Form) -> str:
    if form not in ("kohya", "kohya-ldm"):
        return _OTHER_NAMES
    if form == "kohya" and family == "sdxl" and site.path == "up_blocks.0.upsamplers.0.conv":
        return "the upsampler of up_blocks.0 is not found by its diffusers name"
    fused = site.component == "text_encoder_2" or (
        family == "sd2" and site.component == "text_encoder"
    )
    if fused and ".self_attn." in site.path:
        layer = site.path.rpartition(".")[0]
        parts = ("q_proj", "k_proj", "v_proj", "out_proj")
        if not all(f"{layer}.{part}" in spec.by_path for part in parts):
            return "OpenCLIP attention is applied only when q, k, v and out are all there"
    return ""


def _sdcpp(site: LoraSite, form: Form) -> str:
    text, path = site.component != "unet", site.path
    if text and form in ("diffusers", "old-diffusers"):
        return "text encoder keys in diffusers form are not loaded"
    if form == "old-diffusers" and path.endswith("to_out.0"):
        return "to_out of old diffusers keys is lost"
    if form in ("kohya-ldm", "comfy"):
        return "time_embedding is lost" if path.startswith("time_embedding") else ""
    return "layers outside attention, resnets and samplers are ignored" if EDGE.match(path) else ""


def scale_notes(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Warnings about alphas and ranks that some tools scale wrongly, for a file as it is."""
    alphas = [
        float(a.reshape(-1)[0]) for k, a in tensors.items() if k.endswith(".alpha") and a.size
    ]
    downs = [a for k, a in tensors.items() if re.search(r"lora_down|lora_A|\.down\.", k)]
    ranks = {array.shape[0] for array in downs if array.ndim >= 2}
    notes = []
    if alphas and (len(set(alphas)) > 1 or len(alphas) < len(downs)):
        notes.append("alphas differ or are partly missing: diffusers scales attention wrongly")
    if len(ranks) > 1 and not alphas:
        notes.append("mixed ranks without alpha: diffusers 0.33 scales them wrongly")
    return notes


def lines(rows: Iterable[ToolReport], total: int) -> list[str]:
    """What the commands print."""
    width = max(map(len, TOOLS))
    result = []
    for row in rows:
        count = "" if row.status in ("full", "untested") else f" {row.num_sites}/{total}"
        reason = f"  ({row.reason})" if row.reason else ""
        result.append(f"  {row.tool:<{width}}  {row.status}{count}{reason}")
    return result
