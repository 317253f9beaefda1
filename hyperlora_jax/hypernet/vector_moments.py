"""Mean and inner products of LoRA vectors that need not fit into memory: rows of arrays or of
files, read in chunks."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from hyperlora_jax.array_types import Float

CHUNK = 512  # vectors in memory at a time, twice for inner products


def chunks(vectors: Any) -> Iterator[slice]:
    """Slices of at most `CHUNK` rows, one after another."""
    starts = range(0, len(vectors), CHUNK)
    return (slice(start, min(start + CHUNK, len(vectors))) for start in starts)


def mean(vectors: Any) -> Float[np.ndarray, " d"]:
    """Mean of vectors [t, d], to the last bit that of the whole array."""
    total = np.zeros(vectors[:1].shape, np.float32)
    for rows in chunks(vectors):
        total = np.concatenate([total, vectors[rows]]).sum(axis=0, keepdims=True)
    return total[0] / np.float32(len(vectors))


def gram(vectors: Any, centre: Float[np.ndarray, " d"], dtype: Any) -> Float[np.ndarray, "t t"]:
    """Inner products of vectors [t, d] less `centre`, counted in `dtype`, as float64."""
    found = np.empty((len(vectors), len(vectors)))
    for a in chunks(vectors):
        left = (vectors[a] - centre).astype(dtype)
        for b in chunks(vectors):
            if b.start > a.start:
                break
            right = left if b == a else (vectors[b] - centre).astype(dtype)
            found[a, b] = left @ right.T
            found[b, a] = found[a, b].T
    return found


def combined(
    weights: Float[np.ndarray, "k t"], vectors: Any, centre: Float[np.ndarray, " d"]
) -> Float[np.ndarray, "k d"]:
    """weights @ (vectors - centre)."""
    found = np.zeros((len(weights), len(centre)))
    for rows in chunks(vectors):
        found += weights[:, rows] @ (vectors[rows] - centre)
    return found
