"""Base models on the Hugging Face hub: of tens of GB, the files that a base is read from.

A repository holds the same weights many times: single files, pickles, ONNX, Flax and OpenVINO
versions, half precision, weights before averaging, a safety checker. Taken are configs, tokenizers
and one set of weights for each component, in the order in which `weight_files` reads.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files.base_files import PICKLED_STEMS, WEIGHT_STEMS

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
INDEX = "model_index.json"
TEXTS = re.compile(r"(tokenizer|tokenizer_2)/[^/]+\.(json|txt)|scheduler/scheduler_config\.json")
SHARD, VARIANT = r"(-\d+-of-\d+)?", r"(?P<variant>\.\w+)?"


def download(source: str, variant: str | None = None) -> Path:
    """The folder in the hub's cache with what `needed_files` names. Without a network it is what an
    earlier download left there.

    Raises:
        UserError: no such repository, or none of a base model.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(source)
    except Exception as error:
        try:
            return Path(snapshot_download(source, allow_patterns=[INDEX], local_files_only=True))
        except Exception:
            raise UserError(
                f"{source}: not a directory, and not found on the hub ({storage.reason(error)})"
            ) from error
    wanted = needed_files(source, names, variant)
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as error:
        raise UserError(
            f"{source}: download from the hub failed ({storage.reason(error)})"
        ) from error


def needed_files(source: str, names: Sequence[str], variant: str | None = None) -> list[str]:
    """Those of a repository's files that a base is read from, sorted.

    Args:
        names: all files, as paths within the repository.
        variant: as of `StableDiffusion.from_pretrained`.

    Raises:
        UserError: no UNet in folders, or a component without weights (of the variant).
    """
    if "unet/config.json" not in names:
        single = [name for name in names if "/" not in name and name.endswith(".safetensors")]
        other = f"; download {single[0]} and name that file" if single else ""
        raise UserError(f"{source}: has no unet/config.json, expected a diffusers model{other}")
    wanted = [name for name in names if name == INDEX or TEXTS.fullmatch(name)]
    for component in COMPONENTS:
        config = f"{component}/config.json"
        if config in names:
            weights = _weights(component, names, variant)
            if not weights:
                kind = f"{variant} " if variant else ""
                raise UserError(f"{source}: has no {kind}weights of the {component}")
            wanted += [config, *weights]
    return sorted(wanted)


def _weights(component: str, names: Iterable[str], variant: str | None) -> list[str]:
    """One file or one index and its shards: safetensors, or pickles where there is nothing else."""
    stem = WEIGHT_STEMS[component]
    pickled = PICKLED_STEMS.get(stem, stem)
    own = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
    for name, ending in ((stem, "safetensors"), (pickled, "bin")):
        forms = (
            rf"{name}{SHARD}{VARIANT}\.{ending}",
            rf"{name}{VARIANT}{SHARD}\.{ending}",
            rf"{name}\.{ending}\.index{VARIANT}\.json",
            rf"{name}{VARIANT}\.{ending}\.index\.json",
        )
        by_variant: dict[str, list[str]] = {}
        for file in own:
            match = next(filter(None, (re.fullmatch(form, file) for form in forms)), None)
            if match:
                by_variant.setdefault(match["variant"] or "", []).append(file)
        for suffix in [f".{variant}"] if variant else ["", ".fp16", *sorted(by_variant)]:
            if suffix in by_variant:
                return [f"{component}/{file}" for file in _one_form(by_variant[suffix])]
    return []


def _one_form(names: list[str]) -> list[str]:
    """The whole file where a variant is there both whole and in shards."""
    whole = [name for name in names if "-of-" not in name and not name.endswith(".json")]
    return whole or names
