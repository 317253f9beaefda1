"""Header texts of written files: what other tools look for, and our own provenance.

Only strings and no dates: the same LoRA gives the same bytes. Our keys start with "hyperlora.":
spec (fingerprint), base_hash, checkpoint, reference_hash, seed, strength, trigger, …

They also tell the family of base models, "sd1", "sd2" or "sdxl". The file's own word comes first
(`declared`), its structure second (`recognise`): module paths and transformer depth, then the width
of the text states, then the kind of proj_in (a convolution in SD 1.x, a linear layer later). A LoRA
of any other base is refused by its keys.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import Literal, get_args

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.lora_files.safetensors_io import KOHYA_HASH, OWN_HASH, OWN_MARK

Family = Literal["sd1", "sd2", "sdxl"]
FAMILIES: tuple[Family, ...] = get_args(Family)
NAMES: dict[Family, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
_XL = re.compile(
    r"^text_encoder_2\.|^add_embedding\.|^up_blocks\.0\.attentions\."
    r"|\.transformer_blocks\.([1-9]\d*)\."
)
_SD = re.compile(r"^down_blocks\.0\.attentions\.|^up_blocks\.3\.|^down_blocks\.3\.")
_PROJECTION = re.compile(r"\.attentions\.\d+\.proj_(in|out)$")
_TEXT_STATES = re.compile(r"\.attn2\.to_[kv]$")
_WIDTHS: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


_DECLARED: tuple[tuple[str, str, Family], ...] = (  # header key, start of its value, family
    ("ss_base_model_version", "sdxl", "sdxl"),
    ("ss_base_model_version", "sd_v2", "sd2"),
    ("ss_base_model_version", "sd_v1", "sd1"),
    ("modelspec.architecture", "stable-diffusion-xl", "sdxl"),
    ("modelspec.architecture", "stable-diffusion-v2", "sd2"),
    ("modelspec.architecture", "stable-diffusion-v1", "sd1"),
    ("ss_v2", "true", "sd2"),
)


def declared(metadata: Mapping[str, str]) -> tuple[Family, str] | None:
    """(family, the header's words) of a file that says what it is for; None where none does.

    Raises UserError when the header says two things.
    """
    said: dict[Family, str] = {}
    for key, start, family in _DECLARED:
        if metadata.get(key, "").lower().startswith(start):
            said.setdefault(family, f"{key} = {metadata[key]}")
    if len(said) > 1:
        raise UserError(
            f"its header says {' but '.join(said.values())}; name the base's family (--base sd1, …)"
        )
    return next(((family, f"its header says {text}") for family, text in said.items()), None)


def predicts_velocity(metadata: Mapping[str, str]) -> bool:
    """Whether the header says that the base predicts v (the 768-pixel Stable Diffusion 2.x)."""
    return (
        metadata.get("ss_base_model_version", "").endswith("_v")
        or "-768-v" in metadata.get("modelspec.architecture", "")
        or metadata.get("modelspec.prediction_type", "").lower().startswith("v")
        or metadata.get("hyperlora.prediction_type") == "v_prediction"
    )


def tell(spec: LoraSpec, metadata: Mapping[str, str]) -> tuple[Family, str]:
    """(family, evidence) of a file: what its header says, else what its sites look like. Where both
    differ the evidence says so.

    Raises UserError when the header says two things.
    """
    said, (looks, why) = declared(metadata), recognise(spec)
    if said is None:
        return looks, why
    family, evidence = said
    # "attn1 of one block" looks like anything; only names that other families lack contradict.
    if family != looks and not why.startswith("undecidable"):
        evidence += f"; its layers look like {looks} ({why})"
    return family, evidence


@functools.lru_cache(maxsize=64)
def recognise(spec: LoraSpec) -> tuple[Family, str]:
    """(family, the evidence in words). Undecidable means "sd1", and the evidence says so."""
    paths = [site.path for site in spec.sites]
    if path := next((path for path in paths if _XL.search(path)), None):
        return "sdxl", f"has {path}"
    kinds = {site.kind for site in spec.sites if _PROJECTION.search(site.path)}
    not_xl = next((path for path in paths if _SD.search(path)), None)
    widths = {site.in_features for site in spec.sites if _TEXT_STATES.search(site.path)}
    text = {s.in_features for s in spec.component("text_encoder") if s.path.endswith("q_proj")}
    family = _WIDTHS.get(next(iter(widths))) if len(widths) == 1 else None
    if family is not None and not (family == "sdxl" and not_xl):
        return family, f"text states of width {widths.pop()}"
    if kinds == {"linear"}:
        return "sd2", "proj_in and proj_out are linear layers"
    if kinds == {"conv"}:
        return "sd1", "proj_in and proj_out are convolutions"
    if not widths and text and text <= {768, 1024}:
        width = text.pop()
        return _WIDTHS[width], f"text encoder of width {width}"
    return "sd1", "undecidable from its sites; taken as Stable Diffusion 1.x"


def check(family: str | None, spec: LoraSpec) -> Family:
    """The given family, or the recognised one when it is None. Raises UserError if unknown."""
    if family is None:
        return recognise(spec)[0]
    if family not in FAMILIES:
        raise UserError(f"family {family!r} is unknown; expected one of {list(FAMILIES)}")
    return family


PREFIX = "hyperlora."
_ARCHITECTURES: dict[Family, str] = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}
_VERSIONS: dict[Family, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_RESOLUTIONS: dict[Family, str] = {"sd1": "512x512", "sd2": "512x512", "sdxl": "1024x1024"}
_FOREIGN = ("ss_", "sshs_", "modelspec.", PREFIX)
# An owner's own words under keys without a prefix.
_OWNERS = ("author", "description", "licence", "license", "tags", "trigger_words", "usage")
# Of the source's factors or file, no longer true of what is written from them.
_OF_FACTORS = (
    "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    "ss_network_dropout", "ss_v2", "ss_base_model_version", "ss_steps", "ss_sd_scripts_commit_hash",
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation",
    "modelspec.resolution", "modelspec.hash_sha256", "modelspec.prediction_type",
)  # fmt: skip
_DERIVED = ("format", "lora_adapter_metadata", KOHYA_HASH, "sshs_legacy_hash", OWN_HASH, OWN_MARK)


def own_metadata(metadata: Mapping[str, object] | None) -> dict[str, str]:
    """Puts "hyperlora." before every key that has no known prefix; numbers become text."""
    result = {}
    for key, text in (metadata or {}).items():
        if not isinstance(text, str | int | float):
            raise UserError(f"metadata {key!r}: {text!r} is no text; file headers hold text only")
        if key not in _DERIVED:
            foreign = key.startswith(_FOREIGN) or key in _OWNERS
            result[key if foreign else PREFIX + key] = str(text)
    return result


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file written from another keeps of its header: our own texts, and the owner's (trigger
    words, tags, author, licence, comments); not what describes the source's factors."""
    prefixes = (*_FOREIGN, *_OWNERS)
    return {
        key: text
        for key, text in metadata.items()
        if key.startswith(prefixes) and key not in (*_OF_FACTORS, *_DERIVED)
    }


def build(
    spec: LoraSpec, family: Family, metadata: Mapping[str, object] | None, kohya: bool
) -> dict[str, str]:
    """Complete header of a file with these sites."""
    own = own_metadata(metadata)
    v_prediction = own.get(PREFIX + "prediction_type") == "v_prediction"
    architecture, version = _ARCHITECTURES[family], _VERSIONS[family]
    resolution = _RESOLUTIONS[family]
    if family == "sd2" and v_prediction:
        architecture, version, resolution = "stable-diffusion-v2-768-v/lora", "sd_v2_v", "768x768"
    implementation = "diffusers"
    if family == "sdxl":
        implementation = "https://github.com/Stability-AI/generative-models"
    texts = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.resolution": resolution,
        "modelspec.title": own.get(PREFIX + "title", "hyperlora LoRA"),
    }
    if kohya:
        rank = str(spec.max_rank)
        has_windows = any(site.kernel_size != (1, 1) for site in spec.sites)
        texts |= {
            "ss_v2": str(family == "sd2"),
            "ss_base_model_version": version,
            "ss_network_module": "networks.lora",
            "ss_network_dim": rank,
            "ss_network_alpha": rank,
            "ss_network_args": json.dumps(
                {"conv_alpha": rank, "conv_dim": rank} if has_windows else {}, sort_keys=True
            ),
        }
        if name := own.get(PREFIX + "name"):
            texts["ss_output_name"] = name
    kept = {key: text for key, text in own.items() if key not in _OF_FACTORS}
    return texts | kept | {OWN_MARK: spec.fingerprint}
