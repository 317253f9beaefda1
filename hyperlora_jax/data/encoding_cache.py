"""Subjects encoded once for all: in chunks, which hosts share out and a restart finds again.

    FOLDER/encoded/DIGEST/  texts.npz  00000000.npz  00001024.npz …

A chunk is named after its first subject; it appears whole or not at all. What is asked for
(pictures, captions, models) is in the digest, so files never have to be made anew, and runs can
share them.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import Float, UInt8
from hyperlora_jax.data import encoded_subjects
from hyperlora_jax.data.encoded_subjects import EncodedSubjects
from hyperlora_jax.data.lazy_pictures import LazyPictures
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import multihost
from hyperlora_jax.parallel.sharding import on_mesh
from hyperlora_jax.parallel.shared_work import local_mesh

LAYOUT = 3  # of the files
CHUNK, CHUNK_BYTES = 8192, 2**30  # pictures encoded for one file, and their size in memory
TEXTS = "texts"


def encode_once(
    folder: epath.PathLike,
    sd: Any,
    encoder: Any,
    ids: Sequence[str],
    images: UInt8[np.ndarray, "n v h w 3"] | LazyPictures,
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
) -> EncodedSubjects:
    """`encode_subjects`, kept in files below `folder` and read again for the same pictures,
    captions and models. Every device of every host takes part.

    Args:
        folder: the same for all hosts.

    Raises:
        UserError: a file cannot be written or read.
    """
    unique, index = encoded_subjects.number_captions(captions)
    digest = multihost.agree(f"encoded/{images.shape}", _digest(sd, encoder, ids, images, captions))
    place = epath.Path(folder) / "encoded" / digest
    picture_bytes = int(np.prod(images.shape[2:]))
    per_file = max(1, min(CHUNK, CHUNK_BYTES // picture_bytes) // images.shape[1])
    starts = {f"{start:08d}": start for start in range(0, len(ids), per_file)}
    # All hosts go by what the first one found: a listing can differ between them.
    found = {name for name in (TEXTS, *starts) if (place / f"{name}.npz").exists()}
    found = set(json.loads(multihost.agree(f"{place}/found", json.dumps(sorted(found)))))
    missing = [name for name in (TEXTS, *starts) if name not in found]
    mine = missing[jax.process_index() :: jax.process_count()]
    if mine:
        mesh = local_mesh()
        params = {name: leaf for name, leaf in sd.params.items() if name != "unet"}
        local = on_mesh(dataclasses.replace(sd, params=params), mesh)
        batch_size = -(-batch_size // mesh.size) * mesh.size
    for name in mine:
        if name == TEXTS:
            size = (int(images.shape[2]), int(images.shape[3]))
            states = encoded_subjects.encode_texts(local, unique, size, batch_size, "text states")
            arrays = {"text_states": states}
        else:
            chunk = images[starts[name] : starts[name] + per_file]
            title = f"latents and conditions {starts[name] + len(chunk)}/{len(ids)}"
            arrays = encoded_subjects.encode_pictures(
                local, encoder, chunk, batch_size, title, mesh
            )
        _write(place / f"{name}.npz", arrays)
    if missing:
        multihost.barrier(f"{place}/encoded", multihost.PATIENCE)
    (text_states,) = _read(place / f"{TEXTS}.npz").values()
    chunks = [_read(place / f"{name}.npz") for name in starts]
    arrays = {name: np.concatenate([chunk.pop(name) for chunk in chunks]) for name in [*chunks[0]]}
    return EncodedSubjects(tuple(ids), text_index=index, text_states=text_states, **arrays)


def _digest(
    sd: Any, encoder: Any, ids: Sequence[str], images: Any, captions: Sequence[Sequence[str]]
) -> str:
    asked = {
        "ids": list(ids),
        "pictures": _mark(images),
        "shape": images.shape,
        "captions": [list(own) for own in captions],
        "base": sd.base_hash,
        "dtype": str(jax.tree.leaves(sd.params["unet"])[0].dtype),
        "encoder": "" if encoder is None else encoder.hash,
        "layout": LAYOUT,
    }
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]


def _mark(images: Any) -> str:
    if isinstance(images, LazyPictures):
        return images.mark
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()


def _write(file: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.replaced(file, content.getvalue())
    except Exception as error:  # every file system has its own
        raise UserError(f"{file}: cannot be written ({storage.reason(error)})") from error


def _read(file: epath.Path) -> dict[str, Float[np.ndarray, "*any"]]:
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:
        raise UserError(f"{file}: cannot be read ({storage.reason(error)})") from error
