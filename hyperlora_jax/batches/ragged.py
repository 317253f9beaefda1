"""Rows that belong to subjects, of which each has its own number.

offsets   0        3     5                 9
rows      a0 a1 a2 b0 b1 c0 c1 c2 c3            subject b has rows 3 and 4
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hyperlora_jax.array_types import Float, Index, Int, Params, Rows

SUBJECTS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged:
    """Arrays with a row for every picture (say) of n subjects.

    Attributes:
        offsets: [n + 1]; subject k has the rows `offsets[k]` to `offsets[k + 1]`.
        arrays: [rows, ...] by name, or trees of them; what is read from files does as well
            (`row_files.Rows`).
    """

    offsets: Int[np.ndarray, " m"]
    arrays: Params

    def __post_init__(self):
        lengths = jax.tree.map(len, dict(self.arrays))
        if any(length != self.offsets[-1] for length in jax.tree.leaves(lengths)):
            raise ValueError(f"arrays of {self.offsets[-1]} rows expected, got {lengths}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> Int[np.ndarray, " n"]:
        """How many rows every subject has."""
        return np.diff(self.offsets)

    def of(self, subject: int) -> Params:
        """All rows of a subject, by name."""
        rows = slice(int(self.offsets[subject]), int(self.offsets[subject + 1]))
        return jax.tree.map(lambda array: np.asarray(array[rows]), dict(self.arrays))

    def at(self, subjects: Int[np.ndarray, " b"], columns: Int[np.ndarray, "b k"]) -> Params:
        """[b, k, ...] by name: of every subject its rows with these numbers, from 0 on."""
        rows = self.offsets[subjects][:, None] + columns

        def chosen(array: Any) -> np.ndarray:
            # `take` copies long rows twice as fast as an index does
            return array.take(rows, axis=0) if isinstance(array, np.ndarray) else array[rows]

        return jax.tree.map(chosen, dict(self.arrays))

    def first(self, name: str) -> "Shared":
        """The first row of every subject, read when asked for."""
        return Shared(self.offsets[:-1], self.arrays[name])

    def means(self, name: str) -> Float[np.ndarray, "n *any"]:
        """The mean of every subject's rows, float32."""
        means = np.empty((len(self), *self.arrays[name].shape[1:]), np.float32)
        for start in range(0, len(self), SUBJECTS_AT_ONCE):
            own = self.offsets[start : start + SUBJECTS_AT_ONCE + 1]
            rows = np.asarray(self.arrays[name][int(own[0]) : int(own[-1])], np.float32)
            for k, one in enumerate(np.split(rows, own[1:-1] - own[0]), start):
                means[k] = one.mean(axis=0)
        return means


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """Rows of which many are the same (the text states of captions): row k is `table[index[k]]`."""

    index: Int[np.ndarray, " rows"]
    table: Rows

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Index) -> np.ndarray:
        return np.asarray(self.table[self.index[rows]])


def shared(index: Int[np.ndarray, " rows"], tables: Params) -> dict[str, Shared]:
    """The same rows of every table, by name."""
    return {name: Shared(index, table) for name, table in tables.items()}


def offsets_of(counts: Sequence[int]) -> Int[np.ndarray, " m"]:
    """Offsets of subjects with so many rows each."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)
