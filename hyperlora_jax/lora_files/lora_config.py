"""What a PEFT LoraConfig says about factors: their scale, and what would make them no plain LoRA.

It stands in adapter_config.json, or in the header of a diffusers file as `lora_adapter_metadata`,
there with the component before every key ("unet.r") or, where a UNet was saved by itself, without.
Every field is in one of the tables below; a field that is in none and set is an error. Checked
against the fields of PEFT 0.21 (tests/lora_files/test_lora_config.py).
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from typing import TypeGuard

import numpy as np

from hyperlora_jax.array_types import Json, JsonDict
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import TEXT_ENCODERS
from hyperlora_jax.lora_files import keys

HONOURED = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
        "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_dropout", "megatron_config", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "target_modules", "target_parameters",
        "task_type",
    }
)  # fmt: skip
# Set to anything, the factors alone are not the change of the weights.
REFUSED = frozenset(
    {
        "alora_invocation_tokens", "arrow_config", "bias", "corda_config", "fan_in_fan_out",
        "kasa_config", "layer_replication", "lora_bias", "lora_ga_config", "modules_to_save",
        "monteclora_config", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
        "velora_config",
    }
)  # fmt: skip
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# take the initial factors out of the base's weights.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Kinds that are read with a base, by the tensors that they must then have; what their own configs
# say beside a LoraConfig's fields, "alpha" for its "lora_alpha".
OTHER_KINDS = {"LOHA": ".hada_w", "LOKR": ".lokr_w"}
_OF_OTHER_KINDS = frozenset(
    {
        "alpha", "decompose_both", "decompose_factor", "init_weights", "module_dropout",
        "rank_dropout", "rank_dropout_scale", "use_effective_conv2d",
    }
)  # fmt: skip
_MAGNITUDES = ".lora_magnitude_vector"
_EMPTY = (None, False, "none", [], {}, "")


def check_config(path: str | os.PathLike[str], config: Json, tensors: Collection[str] = ()) -> None:
    """Raises UserError for a LoraConfig of no plain LoRA, or with unknown fields.

    LoHa, LoKr and DoRA pass where the tensors' names are of that kind.
    """
    kind = config.get("peft_type", "LORA")
    own = OTHER_KINDS.get(kind) if isinstance(kind, str) else None
    other = own is not None and any(own in name for name in tensors)
    dora = bool(config.get("use_dora")) and any(_MAGNITUDES in name for name in tensors)
    if kind != "LORA" and not other:
        raise UserError(f"{path}: peft_type {kind!r} is not supported, only LORA is")
    for field, value in config.items():
        if (dora and field == "use_dora") or (other and field in _OF_OTHER_KINDS):
            continue
        if field == "init_lora_weights":
            if value not in PLAIN_INITIALISATIONS:
                raise UserError(
                    f"{path}: init_lora_weights {value!r} changes the base model's weights, so the "
                    "factors alone are not the LoRA; convert it with PEFT "
                    "(save_pretrained(path_initial_model_for_weight_conversion=…))"
                )
        elif field in REFUSED and value not in _EMPTY:
            raise UserError(f"{path}: {field} = {value!r} is not supported, only plain LoRA is")
        elif field not in {*HONOURED, *REFUSED, *HARMLESS} and value not in _EMPTY:
            raise UserError(f"{path}: field {field!r} (value {value!s:.60}) is unknown")


def config_scale(
    path: str | os.PathLike[str], config: Json, module: str, rank: int | None
) -> float:
    """alpha/r (alpha/√r with rslora) of one module by a LoraConfig, patterns included.

    Raises UserError when the rank is another one; None where the tensors do not show it.
    """
    wanted = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    usual = config.get("lora_alpha", config.get("alpha", 8))
    alpha = _pattern(config.get("alpha_pattern"), module, usual)
    if not (_is_number(wanted) and _is_number(alpha)) or 0 in (alpha, wanted):
        raise UserError(f"{path}: r {wanted!r}, lora_alpha {alpha!r} of {module}, expected numbers")
    size = wanted if rank is None else rank
    if wanted != size:
        raise UserError(f"{path}: rank of {module} is {wanted}, its factors have {size}")
    return float(alpha) / (float(size) ** 0.5 if config.get("use_rslora") else float(size))


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _pattern(patterns: object, module: str, default: object) -> object:
    for pattern, value in (patterns or {}).items() if isinstance(patterns, dict) else ():
        if module == pattern or module.endswith("." + pattern):
            return value
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error:
            continue
    return default


def header_scales(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], text: str
) -> dict[str, np.ndarray]:
    """ ".scale" entries from the header's `lora_adapter_metadata`, whatever form the keys have.

    Raises UserError where the file's own alpha says something else.
    """
    configs = _configs(path, text)
    scales, checked = {}, set()
    for key, array in tensors.items():
        named = keys.split_role(key)
        if named is None or named[1] != "down" or array.ndim < 1:
            continue
        stem = named[0]
        component, module = _module_of(stem)
        config = configs.get(component, configs.get(""))
        if config is None:
            continue
        if component not in checked:
            check_config(path, config, tensors)
            checked.add(component)
        scale = config_scale(path, config, module, array.shape[0])
        own = tensors.get(f"{stem}.alpha")
        if own is not None and own.size == 1:
            by_alpha = float(own.reshape(-1)[0]) / array.shape[0]
            if abs(by_alpha - scale) > 1e-3 * abs(scale):
                raise UserError(
                    f"{path}: {stem}.alpha gives scale {by_alpha:g}, lora_adapter_metadata gives "
                    f"{scale:g}; which one was meant cannot be told"
                )
        scales[f"{stem}.scale"] = np.array(scale, np.float64)
    return scales


def _configs(path: str | os.PathLike[str], text: str) -> dict[str, JsonDict]:
    """{component, "" for none: LoraConfig} of the header's text."""
    configs: dict[str, JsonDict] = {}
    try:
        for key, value in json.loads(text).items():
            component, _, field = key.rpartition(".")
            configs.setdefault(component, {})[field] = value
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: lora_adapter_metadata is no JSON object") from error
    return configs


def _module_of(stem: str) -> tuple[str, str]:
    """(component, module path inside it as PyTorch names it) of a key's stem."""
    site = keys.canonical_path(stem)
    if site is None:  # reported by name when the sites are read
        component, _, module = stem.partition(".")
        return component, module
    component, _, module = site.partition(".")
    return (component, module) if component in TEXT_ENCODERS else ("unet", site)
