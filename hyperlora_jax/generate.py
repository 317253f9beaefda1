"""Checkpoint + reference pictures → LoRA files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.data.image_folder import open_image_folder
from hyperlora_jax.data.pictures import SUFFIXES
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.model import Hypernetwork
from hyperlora_jax.hypernet.references import read_references
from hyperlora_jax.lora import factors
from hyperlora_jax.lora_files import save_lora

MAX_BATCH = 64


def reference_hash(paths: Sequence[str | Path]) -> str:
    """sha256 over the bytes of the reference files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def generate_one(
    hyper: Hypernetwork,
    references: Sequence[str | Path],
    out: str | Path,
    *,
    strength: float | None = None,
    seed: int = 0,
    **writing: Any,
) -> Path:
    """One subject, one or several references → one file; `writing` goes to `save_lora`.

    Raises:
        UserError: a reference that is no usable picture, an unwritable path.
    """
    pictures = read_references(references, size=_picture_size(hyper))
    lora = hyper.generate(jax.random.key(seed), pictures[None])
    return _write(hyper, lora, 0, references, out, strength, seed, writing)


def generate_many(
    hyper: Hypernetwork,
    subjects: str | Path,
    out: str | Path,
    *,
    strength: float | None = None,
    seed: int = 0,
    **writing: Any,
) -> list[Path]:
    """A folder per subject → a file per subject in the folder `out`.

    All subjects use the number of references that the smallest folder has.

    Raises:
        UserError: an empty folder, a picture that cannot be used.
    """
    folders = open_image_folder(subjects)
    files = [_pictures(folder) for folder in folders]
    count = min(map(len, files))
    size = _picture_size(hyper)
    written = []
    for start in range(0, len(folders), MAX_BATCH):
        chunk = range(start, min(start + MAX_BATCH, len(folders)))
        pictures = np.stack([read_references(files[i][:count], size=size) for i in chunk])
        loras = hyper.generate(jax.random.key(seed), pictures)
        for k, i in enumerate(chunk):
            path = Path(out) / f"{folders[i].name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(_write(hyper, loras, k, files[i][:count], path, strength, seed, writing))
    return written


def _write(
    hyper: Hypernetwork,
    loras: Params,
    index: int,
    references: Sequence[str | Path],
    out: str | Path,
    strength: float | None,
    seed: int,
    writing: dict[str, Any],
) -> Path:
    strength = hyper.default_strength if strength is None else strength
    lora = jax.device_get(factors.scale(factors.index(loras, index), strength))
    metadata = {
        "base_hash": hyper.facts["base_hash"],
        "base": hyper.facts["base"],
        "encoder_hash": hyper.encoder.hash,
        "reference_hash": reference_hash(references),
        "seed": seed,
        "strength": strength,
        "training_steps": hyper.facts.get("num_steps", 0),
    }
    try:
        return save_lora(
            out, lora, hyper.spec, family=hyper.facts["family"], metadata=metadata, **writing
        )
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from error


def _picture_size(hyper: Hypernetwork) -> int | None:
    module = getattr(hyper.encoder, "module", None)
    return getattr(module, "image_size", None)


def _pictures(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder}: has no pictures, expected {', '.join(SUFFIXES)}")
    return found
