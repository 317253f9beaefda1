"""Which tool loads which file, told beforehand from rules; none of the tools is needed.

The rules are what was measured with diffusers 0.42 and 0.33, PEFT, kohya sd-scripts, LyCORIS,
ComfyUI and stable-diffusion.cpp, and read in A1111's source, for each form of keys.

`inspect_lora` gives the whole report of a file as plain data.
"""

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, cast

import numpy as np

from hyperlora_jax.array_types import Json, Params
from hyperlora_jax.lora import other_kinds
from hyperlora_jax.lora.layer_fit import of_family
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors
from hyperlora_jax.lora_files import convert, keys
from hyperlora_jax.lora_files import header as families
from hyperlora_jax.lora_files.base_files import BaseModel
from hyperlora_jax.lora_files.header import Family
from hyperlora_jax.lora_files.reading import DROP_DIFFERENCES, load_lora, read_tensors

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
_OTHER_DIMENSIONS = "its factors have other dimensions than the layers"
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
    return _row(tool, spec, {s.path: _loss(tool, s, spec, family, form) for s in spec.sites})


def _row(tool: str, spec: LoraSpec, reasons: Mapping[str, str]) -> ToolReport:
    lost = tuple(path for path, reason in reasons.items() if reason)
    applied = len(spec) - len(lost)
    status = "full" if not lost else "part" if applied else "none"
    why = "; ".join(sorted({reason for reason in reasons.values() if reason}))
    return ToolReport(tool, status, applied, lost, why)


_UNTESTED_XL = {
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
        mixed = len({s.rank for s in spec.sites}) > 1
        reason = _diffusers(tool, site, family, form, mixed)
        return reason or (_diffusers_text(site, spec) if form.startswith("kohya") else "")
    if tool == "ComfyUI":
        diffusers = form == "diffusers"
        if diffusers and ".attn" in site.path:
            return "attention keys in diffusers form are not loaded"
        return _OTHER_NAMES if diffusers and site.path.endswith("text_projection") else ""
    if tool == "A1111":
        return _a1111(site, spec, family, form)
    if tool == "stable-diffusion.cpp":
        return _sdcpp(site, form)
    if form != "kohya" and (form != "kohya-ldm" or family != "sdxl"):
        return _OTHER_NAMES
    if tool == "LyCORIS" and form == "kohya-ldm" and site.component == "unet":
        return "its names are those of sd-scripts' UNet, diffusers' UNet has others"
    if tool == "kohya sd-scripts" and EDGE.match(site.path):
        return "layers outside attention, resnets and samplers are ignored"
    return ""


def _diffusers(tool: str, site: LoraSite, family: Family, form: Form, mixed: bool) -> str:
    if form == "comfy" or (form == "kohya-ldm" and family != "sdxl"):
        return _OTHER_NAMES
    if form == "kohya" and family == "sdxl" and site.path.startswith("add_embedding"):
        return "add_embedding is dropped from kohya files"
    if tool != "diffusers" and form == "diffusers" and mixed:
        return "mixed ranks without alpha are scaled wrongly"
    if tool != "diffusers" and form.startswith("kohya") and EDGE.match(site.path):
        return "layers outside attention, resnets and samplers are dropped"
    return ""


def _diffusers_text(site: LoraSite, spec: LoraSpec) -> str:
    """Of kohya files, it tells the form of a text encoder's layers by an out_proj, or else by the
    MLP."""
    for component, (attends, ends, others) in _text_layers(spec).items():
        if attends and not ends and not others:
            return "it refuses attention of a text encoder without any out_proj"
        if attends and not ends and site.component == component and ".self_attn." in site.path:
            return "attention of a text encoder is skipped where no out_proj is beside it"
    return ""


@functools.lru_cache(maxsize=8)
def _text_layers(spec: LoraSpec) -> dict[str, tuple[bool, bool, bool]]:
    """{text encoder: whether there is attention, an out_proj of it, another layer}."""
    paths: dict[str, list[str]] = {}
    for site in spec.sites:
        if site.component != "unet":
            paths.setdefault(site.component, []).append(site.path)
    return {
        component: (
            any(".self_attn." in path for path in own),
            any(path.endswith(".out_proj") for path in own),
            any(".mlp." in path for path in own),
        )
        for component, own in paths.items()
    }


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


# Keys of a file that is wholly of one form: what the rules above were measured with.
_TEXT = r"lora_te[12]?_text_\w+"
_UNET = r"unet\.(?!_orig_mod|module|base_model)[\w.]+"
_CLIP = r"(?:text_encoder\.|text_encoder_2\.text_)[\w.]+"
_NEW, _OLD = r"\.lora_[AB]\.weight", r"(?:_lora|\.lora|\.lora_linear_layer)\.(?:down|up)\.weight"
_REGULAR = {
    "kohya": rf"(?:lora_unet_\w+|{_TEXT})\.(?:lora_(?:down|up)\.weight|alpha)",
    "diffusers": rf"{_UNET}{_NEW}|{_CLIP}(?:{_NEW}|{_OLD})",
    "old-diffusers": rf"{_UNET}{_OLD}|{_CLIP}(?:{_NEW}|{_OLD})",
    "comfy": rf"(?:diffusion_model\.[\w.]+|{_TEXT})\.(?:lora_(?:[AB]|down|up)\.weight|alpha)",
    "peft": r"base_model\.model\..*",
    "weights2weights": r"base_model\.model\..*",
}
_COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.")
# The down factors that ComfyUI finds, by the map of names in its comfy/lora.py.
_COMFY = re.compile(
    r"(?:lora_unet_\w+|lycoris_(?=down_|mid_|up_|conv_|time_|add_)\w+|diffusion_model\.(?!down_|up_|mid_)[\w.]+"
    r"|(?:unet\.)?(?=(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_emb|add_emb))"
    r"(?!.*attn\d\.to_)[\w.]+"
    r"|lora_te1?_text_model_\w+|lora_te2_text_\w+|lora_te1_text_projection"
    r"|text_encoder(?:_2)?\.text_model\.[\w.]+(?:_proj|\.fc[12])"
    r"|text_encoders\.clip_[lg]\.transformer\.text_[\w.]+)"
    r"(?:\.lora_down\.weight|_lora\.down\.weight|\.lora_A(?:\.default)?(?:\.weight)?"
    r"|\.lora(?:_linear_layer)?\.down\.weight)"
)
_REGULAR["kohya-ldm"] = _REGULAR["kohya"]
_SGM = re.compile(r"input_blocks|middle_block|output_blocks")
_NOT_SGM = re.compile(r"down_blocks|mid_block|up_blocks")


def source_report(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    spec: LoraSpec,
    family: Family,
    fits: bool,
) -> list[ToolReport]:
    """One row for each tool, for a file as another program left it: what deviates from its form
    decides. `fits` is False where factors have not the dimensions that layers of the family have.
    """
    form = form_of(tensors)
    regular = all(re.fullmatch(_REGULAR[form], key) for key in tensors if key[-6:] != ".scale")
    rows = []
    for row in report(spec, family, form):
        if row.tool == "PEFT" or row.tool.startswith("diffusers"):
            reasons = {} if fits else dict.fromkeys(spec.by_path, _OTHER_DIMENSIONS)
            if row.tool != "PEFT" and row.status != "none":
                reasons = reasons or _diffusers_losses(tensors, metadata, spec, form, regular)
            if row.status != "none":
                row = _row(row.tool, spec, dict.fromkeys(row.lost, row.reason) | reasons)
        elif row.tool == "ComfyUI" and form not in ("peft", "weights2weights"):
            row = _row(row.tool, spec, _comfy_losses(tensors))
        elif not regular:
            row = ToolReport(row.tool, "untested", 0, (), "never tried with names like these")
        rows.append(row)
    return rows


def _comfy_losses(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """{layer: why ComfyUI does not apply it, or not at its strength; "" where it does}."""
    reasons = {}
    for key, path in _paths(tensors):
        reasons[path] = "" if _COMFY.fullmatch(key) else _OTHER_NAMES
        up = next((key.replace(a, b) for a, b in _PAIRS if a in key), "")
        if not reasons[path] and up not in tensors:
            reasons[path] = "its up factor is named otherwise"
        scale = f"{(keys.split_role(key) or ('',))[0]}.scale"
        if scale in tensors and not reasons[path]:
            reasons[path] = "it does not read .scale"
    return reasons


_PAIRS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), (".down.", ".up."))


def _diffusers_losses(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    spec: LoraSpec,
    form: Form,
    regular: bool,
) -> dict[str, str]:
    """{layer: why diffusers does not read it, or not at its strength}."""
    everything = ""
    text = metadata.get("lora_adapter_metadata", "")
    scaled = any(key.endswith(".scale") for key in tensors) and not text
    if form in ("kohya", "kohya-ldm"):
        if scaled:
            everything = "it refuses .scale"
        elif text and any(key.endswith(".alpha") for key in tensors):
            everything = "it refuses alpha beside lora_adapter_metadata"
        elif not regular:
            everything = _OTHER_NAMES
        elif any(map(_SGM.search, tensors)) and any(map(_NOT_SGM.search, tensors)):
            gone = {path for key, path in _paths(tensors) if _SGM.search(key)}
            return dict.fromkeys(gone, "it skips sgm names where diffusers names stand beside them")
        return dict.fromkeys(spec.by_path, everything) if everything else _misread(tensors, spec)
    if any("lora" not in key for key in tensors if key[-6:] != ".scale") or scaled:
        everything = "it refuses alpha or scale beside such keys"
    elif not regular or any(_SGM.search(key) for key in tensors):
        named = [key for key in tensors if key.startswith(_COMPONENTS)]
        sound = re.compile(rf"(?!.*(?:{_SGM.pattern}))(?:{_REGULAR[form]})")
        if named and all(map(sound.fullmatch, named)):
            gone = {path for key, path in _paths(tensors) if key not in named}
            return dict.fromkeys(gone, "it skips keys without the model's name (unet.)")
        everything = _OTHER_NAMES
    elif text and any(f'"{site.component}.r"' not in text for site in spec.sites):
        everything = "its lora_adapter_metadata lacks a model that the file has layers of"
    return dict.fromkeys(spec.by_path, everything) if everything else {}


def _paths(tensors: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """(key of the down factor, layer) of every layer."""
    roles = [(key, keys.split_role(key)) for key in tensors]
    return [(key, keys.canonical_path(role[0]) or "") for key, role in roles
            if role is not None and role[1] == "down"]  # fmt: skip


def _misread(tensors: Mapping[str, np.ndarray], spec: LoraSpec) -> dict[str, str]:
    """Layers whose alpha is not that of most layers of their model, which attention gets."""
    alphas: dict[str, dict[str, float | None]] = {}
    for key, path in ((key, path) for key, path in _paths(tensors) if path in spec.by_path):
        alpha = tensors.get(key.replace(".lora_down.weight", ".alpha"))
        own = None if alpha is None else float(alpha.reshape(-1)[0])
        alphas.setdefault(spec.by_path[path].component, {})[path] = own
    lost = {}
    for alpha_of in alphas.values():
        given = collections.Counter(value for value in alpha_of.values() if value is not None)
        if not given:
            continue
        most = given.most_common(1)[0][0]
        for path, value in alpha_of.items():
            value = spec.by_path[path].rank if value is None else value
            if value != most and re.search(r"\.attn\d\.|\.mlp\.", path):
                lost[path] = "alphas differ or are partly missing, it takes that of most layers"
    return lost


def scale_notes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> list[str]:
    """Warnings about alphas and ranks that some tools scale wrongly, for a file as it is, and about
    an alpha that only its header names."""
    alphas = [
        float(a.reshape(-1)[0]) for k, a in tensors.items() if k.endswith(".alpha") and a.size
    ]
    downs = [a for k, a in tensors.items() if re.search(r"lora_down|lora_A|\.down\.", k)]
    ranks = {array.shape[0] for array in downs if array.ndim >= 2}
    notes = []
    if alphas and (len(set(alphas)) > 1 or len(alphas) < len(downs)):
        notes.append("alphas differ or are partly missing: diffusers scales attention wrongly")
    scaled = alphas or any(key.endswith(".scale") for key in tensors)
    said = [f"{key} = {metadata[key]}" for key in _ALPHAS if metadata.get(key)]
    if said and not scaled and not said[0].endswith(f" = {max(ranks, default=0)}"):
        notes.append(f"its header says {said[0]}, its tensors do not: read without, as tools do")
    if len(ranks) > 1 and not alphas:
        notes.append("mixed ranks without alpha: diffusers 0.33 scales them wrongly")
    return notes


_ALPHAS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")


def lines(rows: Iterable[ToolReport], total: int) -> list[str]:
    """What the commands print."""
    width = max(map(len, TOOLS))
    result = []
    for row in rows:
        count = "" if row.status in ("full", "untested") else f" {row.num_sites}/{total}"
        reason = f"  ({row.reason})" if row.reason else ""
        result.append(f"  {row.tool:<{width}}  {row.status}{count}{reason}")
    return result


def inspect_lora(path: str | os.PathLike[str], base: str | None = None) -> Json:
    """JSON-able report: form, family, sites with singular values, norms, tools, header texts.

    `base` is a diffusers directory or a family. LoHa, LoKr and DoRA are shown as the LoRA that they
    become on a directory, else their layers and ranks are. Raises UserError for what is no readable
    LoRA.
    """
    given = convert.open_base(base)
    model = given if isinstance(given, BaseModel) else None
    tensors, metadata = read_tensors(Path(path))
    others = keys.other_layers(tensors)
    if others and model is None:
        return _of_other_kinds(path, tensors, metadata, others)
    lora, spec = load_lora(path, model, [DROP_DIFFERENCES])
    if given is None:
        family, evidence = convert.told(path, spec, metadata)
    else:
        family = model.family if model else families.check(str(base), spec)
        evidence = "given"
    if model is None:
        lora, spec = of_family(path, lora, spec, family)
    layers = model.layers_per_block if model else 2
    rows = source_report(tensors, metadata, spec, family, _fits(tensors, spec, layers))
    if others:
        kinds = _kinds(others)
        rows = [ToolReport(t, "untested", 0, (), f"never tried with {kinds}") for t in TOOLS]
    sites, squares, effective = _sites(lora, spec)
    return {
        "path": str(path),
        "kind": _kinds(others) or "LoRA",
        "form": form_of(tensors),
        "family": family,
        "evidence": evidence,
        "fingerprint": spec.fingerprint,
        "num_parameters": spec.num_parameters,
        "sites": sites,
        "norm": float(np.sqrt(squares)),
        "effective_rank": float(np.mean(effective)),
        "dtypes": sorted({array.dtype.name for key, array in tensors.items() if _is_factor(key)}),
        "metadata": metadata,
        "notes": scale_notes(tensors, metadata),
        "tools": [dataclasses.asdict(row) for row in rows],
    }


def _kinds(others: Mapping[str, Mapping[str, str]]) -> str:
    """ "LoHa", or "DoRA and LoKr"."""
    return " and ".join(sorted({keys.other_kind(group) for group in others.values()}))


def _of_other_kinds(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: dict[str, str],
    others: Mapping[str, Mapping[str, str]],
) -> Json:
    """What names and shapes say of a file with layers that are no plain LoRA."""
    sites = []
    for stem, group in others.items():
        parts = {part: tensors[key] for part, key in group.items()}
        rank = other_kinds.rank_of(parts)
        kind = keys.other_kind(group)
        sites.append({"path": keys.canonical_path(stem) or stem, "kind": kind, "rank": rank})
    told = families.declared(metadata)
    return {
        "path": str(path),
        "kind": _kinds(others),
        "form": form_of(tensors),
        "family": told[0] if told else "base unknown",
        "evidence": told[1] if told else "its header does not name one",
        "num_parameters": sum(tensors[key].size for key in tensors if _is_factor(key)),
        "sites": sites,
        "dtypes": sorted({array.dtype.name for key, array in tensors.items() if _is_factor(key)}),
        "metadata": metadata,
        "notes": [
            f"{_kinds(others)} is no plain LoRA; with --base DIR this shows the LoRA of rank "
            f"{other_kinds.DEFAULT_RANK} that it becomes on that base and what that loses, and "
            "convert --base DIR --rank N writes it"
        ],
        "tools": [],
    }


def _fits(tensors: Mapping[str, np.ndarray], spec: LoraSpec, layers_per_block: int) -> bool:
    """Whether all factors have the number of dimensions that their layers have."""
    for key, array in tensors.items():
        role = keys.split_role(key)
        if role is not None and role[1] in ("down", "up"):
            site = spec.by_path.get(keys.canonical_path(role[0], layers_per_block) or "")
            if site is not None and array.ndim != (2 if site.kind == "linear" else 4):
                return False
    return True


def _is_factor(key: str) -> bool:
    return not key.endswith((".alpha", ".scale"))


def _sites(lora: Params, spec: LoraSpec) -> tuple[list[Json], float, list[float]]:
    """Rows of the sites, sum of squared norms, and exp(entropy of σ²) of each site."""
    rows, squares, effective = [], 0.0, []
    for site in spec.sites:
        pair = site_factors(lora, site)
        down = pair["down"].reshape(site.fan_in, site.rank).astype(np.float64)
        upper_down = cast(np.ndarray, np.linalg.qr(down, mode="r"))
        upper_up = cast(np.ndarray, np.linalg.qr(pair["up"].T.astype(np.float64), mode="r"))
        sigma = np.linalg.svd(upper_down @ upper_up.T, compute_uv=False)
        energy = sigma**2
        squares += float(energy.sum())
        share = energy[energy > 0] / max(energy.sum(), 1e-300)
        effective.append(float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0)
        rows.append(
            {
                "path": site.path,
                "size": f"{site.in_features}→{site.out_features}",
                "kind": site.kind,
                "rank": site.rank,
                "norm": float(np.sqrt(energy.sum())),
                "singular_values": [float(value) for value in sigma],
            }
        )
    return rows, squares, effective
