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
from hyperlora_jax.lora.layer_fit import of_family
from hyperlora_jax.lora.sites import LoraSpec, chosen_by
from hyperlora_jax.lora_files import header as families
from hyperlora_jax.lora_files.base_files import PICKLED, BaseModel, read_base_model
from hyperlora_jax.lora_files.header import PREFIX, carried
from hyperlora_jax.lora_files.peft_directory import adapter_folders, weights_of
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
    chosen = chosen_by("w2w")
    return LoraSpec(tuple(site for path, site in base.layers.items() if chosen(path)))


def is_one_lora(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter or a diffusers LoRA, not a folder of several."""
    return bool(adapter_folders(folder)) or weights_of(folder, DIFFUSERS_NAME) is not None


def find_loras(folder: Path) -> list[Path]:
    """LoRA files and adapter folders below a folder, in name order; hidden ones left out."""
    loras: list[Path] = []
    for path in sorted(folder.rglob("*")):
        inside = any(parent in loras for parent in path.parents)
        if inside or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if bool(adapter_folders(path)) if path.is_dir() else _is_file_of_lora(path):
            loras.append(path)
    if not loras:
        there = f"; not read: {others}" if (others := _passed_over(folder, loras)) else ""
        raise UserError(f"{folder}: no LoRA file or adapter folder in it{there}")
    return loras


def _is_file_of_lora(path: Path) -> bool:
    if path.suffix.lower() in PICKLED:
        return not (_STATE.match(path.name) or path.with_suffix(".safetensors").exists())
    return path.suffix.lower() == ".safetensors"


def _passed_over(root: Path, loras: Collection[Path]) -> str:
    """PyTorch files that are no LoRAs of their own: a trainer's state, a second form of one."""
    files = [path for path in sorted(root.rglob("*")) if path.suffix in PICKLED]
    inside = {*loras, *(file for path in loras if path.is_dir() for file in path.rglob("*"))}
    return ", ".join(str(path.relative_to(root)) for path in files if path not in inside)


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

    A file that cannot be converted does not stop the others: its `error` says why. PyTorch files
    that are no LoRAs are named on stderr. `reading` goes to `convert_file`.
    """
    root, out = Path(source), Path(target)
    jobs: list[tuple[Path, Path]] = []
    taken: dict[Path, Path] = {}
    loras = find_loras(root)
    for path in loras:
        relative = path.relative_to(root)
        name = relative.with_suffix("") if path.is_file() else relative
        if name.name == Path(DIFFUSERS_NAME).stem and name.parent != Path():
            name = name.parent
        place = out / (name if to in _FOLDERS else f"{name}.safetensors")
        if taken.setdefault(place, path) != path:
            raise UserError(
                f"{path} and {taken[place]} would both become {place}; rename or move one"
            )
        if place in loras and place != path:
            raise UserError(f"{path} would replace {place}; name another folder")
        jobs.append((path, place))
    if others := _passed_over(root, loras):
        print(f"note: {root}: not read: {others}", file=sys.stderr)

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
# What trainers keep beside a LoRA to go on with.
_STATE = re.compile(r"optimizer|scheduler|scaler|random_states|rng_state|train(ing|er)_")
