"""Keeps sampled pictures by content, so that a second run computes only what is new.

The key is a hash of everything that decides the pictures: the method's fingerprint (weights and
settings), the evaluation set and the strength. Without a fingerprint nothing is kept. Of several
processes the first one reads and writes.

Embeddings of pictures are kept by content too, made in batches of one size, so that one program
serves all, and shared out over processes, as a foreign encoder can take a tenth of a second for
each.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable

import numpy as np
from etils import epath

from hyperlora_jax.array_types import AnyArray, Float, Json
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.evaluate.protocol import Questions
from hyperlora_jax.parallel import multihost, shared_work
from hyperlora_jax.subjects.encoded_subjects import encode_in_batches


@dataclasses.dataclass(frozen=True)
class SampleCache:
    """Pictures under hashed names in one folder, .npy float32.

    Attributes:
      folder: where; None keeps nothing.
    """

    folder: epath.PathLike | None = None

    def images(
        self,
        fingerprint: str,
        evaluation: Questions,
        strength: float,
        sample: Callable[[], AnyArray],
    ) -> Float[np.ndarray, "i c h w 3"]:
        """The pictures of that key, from the folder or from `sample`, which then is called once."""
        if self.folder is None or not fingerprint:
            return np.asarray(sample(), np.float32)
        return remembered(self.folder, cache_key(fingerprint, evaluation, strength), sample)


def remembered(
    folder: epath.PathLike, key: str, make: Callable[[], AnyArray]
) -> Float[np.ndarray, "*any"]:
    """The array of a hashed name, from `folder` or, float32, from `make`, and then kept there."""
    file = epath.Path(folder) / f"{key}.npy"
    cached = shared_work.of_first(lambda: _read(file))
    if cached is not None:
        return cached
    array = np.asarray(make(), np.float32)
    if not multihost.is_first():
        return array
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as stream:
        np.save(stream, array)
    unfinished.replace(file)
    return array


def cache_key(fingerprint: str, evaluation: Questions, strength: float) -> str:
    """Hex sha256 of what decides the pictures."""
    asked: Json = {
        "fingerprint": fingerprint,
        "strength": float(strength),
        "facts": dict(evaluation.facts),
        "captions": evaluation.captions,
        "identities": [person.id for person in evaluation.identities],
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for array in (*evaluation.views, evaluation.noise_seeds, *(evaluation.seen or ())):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(file: epath.Path) -> np.ndarray | None:
    if not file.exists():
        return None
    with file.open("rb") as stream:
        try:
            return np.load(stream, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            return None  # cut off while writing: sampled again


BATCH = 64


def pooled_embeddings(
    encoder: ImageEncoder,
    pictures: Float[np.ndarray, "n h w 3"],
    folder: epath.PathLike | None = None,
    title: str = "encoding pictures",
) -> Float[np.ndarray, "n e"]:
    """The encoder's pooled output.

    Args:
        pictures: in [0, 1].
        folder: where embeddings are kept for the next time; None keeps none.
        title: of the progress bar.
    """
    pictures = np.ascontiguousarray(pictures, np.float32)
    if folder is None:
        return _encode(encoder, pictures, title)
    digest = hashlib.sha256(f"{encoder.hash} {pictures.shape}".encode())
    digest.update(pictures.tobytes())
    return remembered(folder, digest.hexdigest(), lambda: _encode(encoder, pictures, title))


def _encode(encoder: ImageEncoder, pictures: np.ndarray, title: str) -> np.ndarray:
    def here(rows: np.ndarray) -> np.ndarray:
        encoded = encode_in_batches(
            lambda batch: encoder.encode(batch)[0],
            pictures[rows],
            BATCH,
            title if multihost.is_first() else None,
            whole=True,
        )
        return np.asarray(encoded, np.float32)

    return shared_work.shared_rows(len(pictures), here)
