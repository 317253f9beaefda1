"""Header texts of written files: what other tools look for, and our own provenance.

Only strings and no dates: the same LoRA gives the same bytes. Our keys start with "hyperlora.":
spec (fingerprint), base_hash, checkpoint, reference_hash, seed, strength, trigger, …
"""

import json
from collections.abc import Mapping
from typing import Any

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.lora_files.family import Family
from hyperlora_jax.lora_files.safetensors_io import KOHYA_HASH, OWN_HASH, OWN_MARK

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


def own_metadata(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Puts "hyperlora." before every key that has no known prefix; numbers become text."""
    result = {}
    for key, text in (metadata or {}).items():
        if not isinstance(text, str | int | float):
            raise UserError(f"metadata {key!r}: {text!r} is no text; file headers hold text only")
        if key not in _DERIVED:
            known = key.startswith(_FOREIGN) or key in _OWNERS
            result[key if known else PREFIX + key] = str(text)
    return result


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file written from another keeps of its header: our own texts, and the owner's (trigger
    words, tags, author, licence, comments); not what describes the source's factors."""
    known = (*_FOREIGN, *_OWNERS)
    return {
        key: text
        for key, text in metadata.items()
        if key.startswith(known) and key not in (*_OF_FACTORS, *_DERIVED)
    }


def build(
    spec: LoraSpec, family: Family, metadata: Mapping[str, Any] | None, kohya: bool
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
