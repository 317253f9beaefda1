"""Keeps sampled pictures by content, so that a second run computes only what is new.

The key is a hash of everything that decides the pictures: the method's fingerprint (weights and
settings), the evaluation set and the strength. Without a fingerprint nothing is kept. Of several
processes the first one reads and writes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from hyperlora_jax.array_types import AnyArray, Float
from hyperlora_jax.evaluate.questions import Questions
from hyperlora_jax.parallel import multihost, shared_work


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
        return kept(self.folder, cache_key(fingerprint, evaluation, strength), sample)


def kept(
    folder: epath.PathLike, key: str, make: Callable[[], AnyArray]
) -> Float[np.ndarray, "*any"]:
    """The array of a hashed name, from `folder` or, float32, from `make`, and then kept there."""
    file = epath.Path(folder) / f"{key}.npy"
    found = shared_work.of_first(lambda: _read(file))
    if found is not None:
        return found
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
    asked: dict[str, Any] = {
        "fingerprint": fingerprint,
        "strength": float(strength),
        "facts": dict(evaluation.facts),
        "captions": evaluation.captions,
        "identities": [person.id for person in evaluation.identities],
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    seen = () if evaluation.seen is None else (evaluation.seen,)
    for array in (*evaluation.views, evaluation.noise_seeds, *seen):
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
