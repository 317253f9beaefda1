"""Checkpoint + reference pictures → LoRA files."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.data.image_folder import open_image_folder
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.editing import Directions, edit
from hyperlora_jax.hypernet.model import Hypernetwork
from hyperlora_jax.hypernet.references import read_references
from hyperlora_jax.lora import factors, gauge
from hyperlora_jax.lora_files import save_loras

MAX_BATCH = 64
Edits = tuple[Directions, Mapping[str, float]]  # and {attribute: amount}


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
    num_samples: int = 1,
    draw: Mapping[str, Any] | None = None,
    edits: Edits | None = None,
    **writing: Any,
) -> list[Path]:
    """One subject, one or several references → a file per sample; `writing` goes to `save_loras`.

    Args:
        out: the file; with several samples `NAME.safetensors` becomes `NAME-0.safetensors`, ….
        draw: guidance, num_steps, sampler, where they shall differ from the checkpoint's.
        edits: attribute directions and how far to go along them (`hypernet/editing.py`); the
            file's rank grows by the checkpoint's for each, but not in the form "weights2weights",
            which is cut back to rank 1.

    Raises:
        UserError: a reference that is no usable picture, an unwritable path; see also
            `Hypernetwork.generate`.
    """
    pictures = read_references(references, size=_picture_size(hyper))
    key = jax.random.key(seed)
    familiar = _familiar(hyper, pictures[None])[0]
    loras = hyper.generate(key, pictures[None], num_samples=num_samples, **(draw or {}))
    paths = _names(Path(out), num_samples)
    texts = [_texts(hyper, k, familiar, references, strength, seed) for k in range(num_samples)]
    return _write(hyper, loras, edits, paths, texts, strength, writing)


def _names(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(count)]


def generate_many(
    hyper: Hypernetwork,
    subjects: str | Path,
    out: str | Path,
    *,
    strength: float | None = None,
    seed: int = 0,
    num_samples: int = 1,
    draw: Mapping[str, Any] | None = None,
    edits: Edits | None = None,
    **writing: Any,
) -> list[Path]:
    """A folder per subject → a file per subject and sample in the folder `out`.

    All subjects use the number of references that the smallest folder has.

    Raises:
        UserError: an empty folder, a picture that cannot be used.
    """
    folders = open_image_folder(subjects)
    files = [[file.path for file in folder.of_role("reference")] for folder in folders]
    count = min(map(len, files))
    size = _picture_size(hyper)
    written = []
    for start in range(0, len(folders), MAX_BATCH):
        chunk = range(start, min(start + MAX_BATCH, len(folders)))
        pictures = np.stack([read_references(files[i][:count], size=size) for i in chunk])
        key = jax.random.fold_in(jax.random.key(seed), start)
        loras = hyper.generate(key, pictures, num_samples=num_samples, **(draw or {}))
        familiar = _familiar(hyper, pictures)
        paths, texts = [], []
        for k, i in enumerate(chunk):
            paths += _names(Path(out) / f"{folders[i].name}.safetensors", num_samples)
            texts += [
                _texts(hyper, n, familiar[k], files[i][:count], strength, seed)
                for n in range(num_samples)
            ]
        written += _write(hyper, loras, edits, paths, texts, strength, writing)
    return written


def _texts(
    hyper: Hypernetwork,
    sample: int,
    familiar: float | None,
    references: Sequence[str | Path],
    strength: float | None,
    seed: int,
) -> dict[str, Any]:
    """Header texts of one file: where it comes from."""
    return {
        "base_hash": hyper.facts["base_hash"],
        "base": hyper.facts["base"],
        "encoder_hash": hyper.encoder.hash,
        "reference_hash": reference_hash(references),
        "seed": seed,
        "strength": hyper.default_strength if strength is None else strength,
        "sample": sample,
        **({} if familiar is None else {"familiarity": f"{familiar:.3f}"}),
        "generator": hyper.model.get("generator", "regression"),
        "training_steps": hyper.facts.get("num_steps", 0),
    }


def _write(
    hyper: Hypernetwork,
    loras: Params,
    edits: Edits | None,
    paths: Sequence[Path],
    texts: Sequence[dict[str, Any]],
    strength: float | None,
    writing: dict[str, Any],
) -> list[Path]:
    strength = hyper.default_strength if strength is None else strength
    spec = hyper.spec
    if edits is not None:
        loras, spec = edit(loras, *edits)
        texts = [{**text, "edits": json.dumps(dict(edits[1]))} for text in texts]
        if writing.get("format") == "weights2weights":  # which holds no more than rank 1
            loras, spec = gauge.truncate(loras, spec, 1)
    try:
        return save_loras(
            paths,
            factors.scale(loras, strength),
            spec,
            family=hyper.facts["family"],
            metadata=texts,
            **writing,
        )
    except OSError as error:
        raise UserError(
            f"--out {paths[0].parent}: cannot be written ({error.strerror or error})"
        ) from error


def _familiar(hyper: Hypernetwork, references: np.ndarray) -> list[float | None]:
    """Familiarity of every subject, for the files' headers; None where unknown."""
    found = hyper.familiarity(references)
    return [None] * len(references) if found is None else [float(x) for x in found]


def _picture_size(hyper: Hypernetwork) -> int:
    return max(hyper.encoder.image_size)
