"""Checkpoint + reference pictures → LoRA files.

A subject's LoRA depends on its own pictures and the seed alone, not on who else is written with it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from hyperlora_jax.array_types import Array, Json, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.editing import Directions, edit
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import factors, gauge
from hyperlora_jax.lora_files import save_loras
from hyperlora_jax.pictures.image_folder import open_image_folder
from hyperlora_jax.pictures.pictures import reference_pixels

MAX_PICTURES = 64  # at once
Edits = tuple[Directions, Mapping[str, float]]  # and {attribute: amount}
Pictures = Sequence[str | Path]  # of one subject


class Written(NamedTuple):
    """A file: the LoRA's subject, its familiarity (None where unknown) and strength."""

    path: Path
    subject: str
    familiarity: float | None
    strength: float


def reference_hash(paths: Pictures) -> str:
    """sha256 over the bytes of the reference files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def generate_one(
    hyper: Hypernetwork, references: Pictures, out: str | Path, **options: Any
) -> list[Written]:
    """One subject, one or several references → a file per sample.

    Args:
        out: the file; with several samples `NAME.safetensors` becomes `NAME-0.safetensors`, ….
        **options: see `generate_files`.

    Raises:
        UserError: a reference that is no usable picture, an unwritable path; see also
            `Hypernetwork.generate`.
    """
    if not references:
        raise UserError("references: none given, expected at least one picture file")
    if options.get("format", "kohya") == "kohya" and Path(out).is_dir():
        raise UserError(f"--out {out}: is a folder, expected a file for the LoRA of one subject")
    return generate_files(hyper, [references], [Path(out)], **options)


def generate_many(
    hyper: Hypernetwork, subjects: str | Path, out: str | Path, **options: Any
) -> list[Written]:
    """A folder per subject → a file per subject and sample in the folder `out`.

    Every subject is told by all its pictures that are references (`pictures/image_folder.py`).

    Args:
        **options: see `generate_files`.

    Raises:
        UserError: an empty folder, a picture that cannot be used.
    """
    folders = open_image_folder(subjects)
    files = [[file.path for file in folder.of_role("reference")] for folder in folders]
    outs = [Path(out) / f"{folder.name}.safetensors" for folder in folders]
    return generate_files(hyper, files, outs, **options)


def generate_files(
    hyper: Hypernetwork,
    subjects: Sequence[Pictures],
    outs: Sequence[Path],
    *,
    strength: float | None = None,
    seed: int = 0,
    num_samples: int = 1,
    draw: Json | None = None,
    edits: Edits | None = None,
    **writing: Any,
) -> list[Written]:
    """A file per subject and sample, in the order of the subjects.

    Args:
        strength: what is multiplied into the LoRA; None: the checkpoint's own.
        draw: guidance, num_steps, sampler, where they shall differ from the checkpoint's.
        edits: attribute directions and how far to go along them (`hypernet/editing.py`); the
            file's rank grows by the checkpoint's for each, but not in the form "weights2weights",
            which is cut back to rank 1.
        **writing: more for `save_loras`.
    """
    strength = hyper.default_strength if strength is None else strength
    written: dict[int, list[Written]] = {}
    for members in _batches([len(references) for references in subjects]):
        pixels = [[reference_pixels(p, hyper.encoder) for p in subjects[n]] for n in members]
        pooled, tokens = hyper.embed(np.asarray(pixels))
        loras = write_each(hyper, [seed] * len(members), pooled, tokens, num_samples, draw)
        scores = hyper.familiarity_of(pooled)
        familiar = [None] * len(members) if scores is None else [float(x) for x in scores]
        paths = [_names(outs[n], num_samples) for n in members]
        texts = [
            {
                **hyper.provenance,
                "reference_hash": reference_hash(subjects[n]),
                "seed": seed,
                "strength": strength,
                "sample": sample,
                **({} if score is None else {"familiarity": f"{score:.3f}"}),
            }
            for n, score in zip(members, familiar, strict=True)
            for sample in range(num_samples)
        ]
        flat = [path for own in paths for path in own]
        files = _write(hyper, loras, edits, flat, texts, strength, **writing)
        for k, n in enumerate(members):
            own = files[k * num_samples : (k + 1) * num_samples]
            written[n] = [Written(path, outs[n].stem, familiar[k], strength) for path in own]
    return [file for n in sorted(written) for file in written[n]]


def _batches(counts: Sequence[int]) -> Iterator[list[int]]:
    """Places of subjects with equally many pictures, some at a time."""
    for count in sorted(set(counts)):
        members = [n for n, own in enumerate(counts) if own == count]
        size = max(1, MAX_PICTURES // count)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def write_each(
    hyper: Hypernetwork,
    seeds: Sequence[int],
    pooled: Array,
    tokens: Array,
    num_samples: int = 1,
    draw: Json | None = None,
) -> Params:
    """Every subject's LoRAs with a seed of its own, as if it were alone; its samples in a row."""
    draw = draw or {}
    if not hyper.generator.stochastic:
        return hyper.write(seeds[0], pooled, tokens, num_samples=num_samples, **draw)

    def alone(key: Array, pooled: Array, tokens: Array) -> Params:
        return hyper.write(key, pooled[None], tokens[None], num_samples=num_samples, **draw)

    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    loras = jax.vmap(alone)(keys, pooled, tokens)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), loras)


def _names(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(count)]


def _write(
    hyper: Hypernetwork,
    loras: Params,
    edits: Edits | None,
    paths: Sequence[Path],
    texts: Sequence[Json],
    strength: float,
    **writing: Any,
) -> list[Path | epath.Path]:
    spec = hyper.spec
    if edits is not None:
        loras, spec = edit(loras, *edits)
        texts = [{**text, "edits": json.dumps(dict(edits[1]))} for text in texts]
        if writing.get("format") == "weights2weights":  # which holds no more than rank 1
            loras, spec = gauge.truncate(loras, spec, 1)
    try:
        return save_loras(
            paths,
            factors.scale(jax.device_get(loras), strength),
            spec,
            family=hyper.facts["family"],
            metadata=texts,
            **writing,
        )
    except OSError as error:
        raise UserError(
            f"--out {paths[0].parent}: cannot be written ({error.strerror or error})"
        ) from error
