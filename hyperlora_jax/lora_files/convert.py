"""Conversion of LoRA files, one or a folder of them in parallel."""

import concurrent.futures
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import PRESETS, LoraSpec
from hyperlora_jax.lora_files import header as families
from hyperlora_jax.lora_files.base_check import BaseModel, of_family, read_base_model
from hyperlora_jax.lora_files.header import PREFIX, carried
from hyperlora_jax.lora_files.peft_directory import adapter_folders
from hyperlora_jax.lora_files.reading import load_lora, read_metadata
from hyperlora_jax.lora_files.writing import DIFFUSERS_NAME, default_workers, save_lora


@dataclasses.dataclass(frozen=True)
class Converted:
    """One conversion: `error` is "" when it worked, `evidence` tells how the family was found."""

    source: Path
    target: Path | epath.Path
    spec: LoraSpec | None = None
    family: families.Family = "sd1"
    evidence: str = ""
    error: str = ""


def open_base(base: str | None) -> BaseModel | families.Family | None:
    """`--base`: a family's name, a diffusers directory, or None."""
    if base is None or base in families.FAMILIES:
        return base  # type: ignore[return-value]
    return read_base_model(base)


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    dtype: str = "float16",
    base: BaseModel | families.Family | None = None,
    drop: Collection[str] = (),
    rank: int | None = None,
) -> Converted:
    """Reads any form and writes another; the owner's header texts and our own are kept.

    `base` checks the layers and decides the family; without it the header does, or else the sites.
    `drop` as in `load_lora`; `rank` is the highest of a layer. Raises UserError.
    """
    source = Path(source)
    model = base if isinstance(base, BaseModel) else None
    lora, spec = load_lora(
        source, _vector_spec(source, model) if source.suffix == ".npy" else model, drop, rank
    )
    texts = {} if source.suffix == ".npy" else read_metadata(source)
    if model is not None:
        family, evidence = model.family, f"from the base {model.name}"
    elif isinstance(base, str):
        family, evidence = families.check(base, spec), "given"
    else:
        family, evidence = told(source, spec, texts)
    if model is None:
        lora, spec = of_family(source, lora, spec, family)
    from hyperlora_jax.lora import gauge

    if rank is None:
        lora, spec = gauge.cut_above_width(lora, spec)
    else:
        lora, spec = gauge.lower_ranks(lora, spec, rank)
    own = carried(texts)
    if families.predicts_velocity(texts):
        own[f"{PREFIX}prediction_type"] = "v_prediction"
    layers = model.layers_per_block if model else 2
    written = save_lora(target, lora, spec, to, dtype, family, own, layers)
    return Converted(source, written, spec, family, evidence)


def told(
    source: str | os.PathLike[str], spec: LoraSpec, texts: Mapping[str, str]
) -> tuple[families.Family, str]:
    """(family, evidence) of a file: see `header.tell`, whose errors get the file's name."""
    try:
        return families.tell(spec, texts)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _vector_spec(source: Path, base: BaseModel | None) -> LoraSpec:
    if base is None:
        raise UserError(f"{source}: a vector has no names; give --base DIR to read it")
    rules = [re.compile(rule) for rule in PRESETS["w2w"]]
    sites = [site for path, site in base.layers.items() if any(r.search(path) for r in rules)]
    return LoraSpec(tuple(sites))


def is_one_lora(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter or a diffusers LoRA, not a folder of several."""
    return bool(adapter_folders(folder)) or (folder / DIFFUSERS_NAME).exists()


def find_loras(folder: Path) -> list[Path]:
    """LoRA files and adapter folders below a folder, in name order; hidden ones left out."""
    found: list[Path] = []
    for path in sorted(folder.rglob("*")):
        inside = any(parent in found for parent in path.parents)
        if inside or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if bool(adapter_folders(path)) if path.is_dir() else path.suffix == ".safetensors":
            found.append(path)
    if not found:
        pickles = _pickles(folder)
        there = f"; not read, Python pickles: {pickles}" if pickles else ""
        raise UserError(f"{folder}: no LoRA file (.safetensors) or adapter folder in it{there}")
    return found


def _pickles(root: Path) -> str:
    found = [path for path in sorted(root.rglob("*")) if path.suffix in _PICKLES]
    return ", ".join(str(path.relative_to(root)) for path in found)


def convert_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    dtype: str = "float16",
    base: BaseModel | families.Family | None = None,
    num_workers: int | None = None,
    progress: Callable[[Converted], None] | None = None,
    **reading: Any,
) -> list[Converted]:
    """Converts every LoRA below a folder; the results keep its structure and order.

    A file that cannot be converted does not stop the others: its `error` says why. What is no
    .safetensors is named on stderr. `reading` goes to `convert_file`.
    """
    root, out = Path(source), Path(target)
    jobs: list[tuple[Path, Path]] = []
    taken: dict[Path, Path] = {}
    found = find_loras(root)
    for path in found:
        relative = path.relative_to(root)
        if relative.name == DIFFUSERS_NAME and relative.parent != Path():
            relative = relative.parent
        name = str(relative).removesuffix(".safetensors")
        place = out / (name if to in _FOLDERS else f"{name}.safetensors")
        if taken.setdefault(place, path) != path:
            raise UserError(
                f"{path} and {taken[place]} would both become {place}; rename or move one"
            )
        if place in found and place != path:
            raise UserError(f"{path} would replace {place}; name another folder")
        jobs.append((path, place))
    if pickles := _pickles(root):
        print(f"note: {root}: not read, Python pickles: {pickles}", file=sys.stderr)

    def one(job: tuple[Path, Path]) -> Converted:
        try:
            return convert_file(*job, to, dtype, base, **reading)
        except UserError as error:
            return Converted(*job, error=str(error))

    results = []
    with concurrent.futures.ThreadPoolExecutor(num_workers or default_workers()) as pool:
        for result in pool.map(one, jobs):
            results.append(result)
            if progress is not None:
                progress(result)
    return results


_FOLDERS = ("peft", "weights2weights")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
