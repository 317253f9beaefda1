"""Tables in .safetensors files of which only the rows that are asked for are read.

The rows of a table are those of its files in turn. Large files stay on the disk, in whose cache the
operating system keeps what it has room for: a process needs memory for a batch, however large they
are. (Mapping them instead costs a page fault every 64 KiB, and counts as memory of the process.)
Small files are read whole: many short rows are faster from one array.
"""

import dataclasses
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hyperlora_jax.array_types import DType, Index
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io

WHOLE_BYTES = 2**29  # of files that are read whole
MOST_OPEN = 2**16  # files, where the system lets a process have as many
ASKED_AHEAD = 2**16  # bytes of a row from which on a batch's rows are asked of the disk at once


class RowFiles:
    """The tables of some files.

    Raises:
        UserError: a file is damaged, or has other tables than the first.
    """

    def __init__(self, files: Sequence[Path]):
        self._parts: dict[str, list[Part]] = {}
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        _allow_open_files()
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        entries = safetensors_io.read_entries(file)
        kinds = {name: (dtype, shape[1:]) for name, (dtype, shape, _) in entries.items()}
        if self._kinds and kinds != self._kinds:
            raise UserError(f"{file}: holds {kinds}, the files before it {self._kinds}")
        self._kinds = kinds
        try:
            opened = file.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        for name, (_, shape, start) in entries.items():
            self._parts.setdefault(name, []).append(Part(file, opened, start, shape[0]))

    def tables(self) -> dict[str, "Rows | np.ndarray"]:
        """All tables by name."""
        tables = {name: Rows(parts, *self._kinds[name]) for name, parts in self._parts.items()}
        if sum(rows.num_bytes for rows in tables.values()) > WHOLE_BYTES:
            return dict(tables)
        return {name: rows.whole() for name, rows in tables.items()}


def _allow_open_files() -> None:
    """Systems let a process open 1,024 files unasked; latents of 60,000 subjects at 1024 pixels
    are more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN if hard == resource.RLIM_INFINITY else min(MOST_OPEN, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Rows of one file, which begin at byte `start` of it."""

    path: Path
    file: BinaryIO
    start: int
    num_rows: int

    def read(self, out: np.ndarray, first: int, row_bytes: int) -> None:
        """Fills `out` (uint8) with what begins at a row."""
        rest, place = memoryview(out), self.start + first * row_bytes
        try:
            while rest:
                count = os.preadv(self.file.fileno(), [rest], place)
                if not count:
                    raise UserError(f"{self.path}: ends at byte {place}; cut off while it was open")
                rest, place = rest[count:], place + count
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error

    def ask_for(self, row: int, row_bytes: int) -> None:
        """Has the disk read a row, without waiting for it."""
        place = self.start + row * row_bytes
        os.posix_fadvise(self.file.fileno(), place, row_bytes, os.POSIX_FADV_WILLNEED)


class Rows:
    """Looks like an array [rows, ...]; rows are read when they are asked for."""

    def __init__(self, parts: Sequence[Part], dtype: np.dtype, row_shape: tuple[int, ...]):
        self._parts, self.dtype = list(parts), dtype
        self._ends = np.cumsum([part.num_rows for part in parts])
        self.shape = (int(self._ends[-1]), *row_shape)
        self.ndim = len(self.shape)
        self._row_bytes = int(np.prod(row_shape)) * dtype.itemsize
        self.num_bytes = len(self) * self._row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> np.ndarray:
        """A row, a slice of rows, or rows by an array of numbers of any shape."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        asked = np.asarray(index)
        flat = asked.reshape(-1).astype(np.int64)
        if len(flat) and not (flat.min() >= 0 and flat.max() < len(self)):
            raise IndexError(f"rows {flat.min()} to {flat.max()} of {len(self)}")
        out = np.empty((len(flat), self._row_bytes), np.uint8)
        places = self._places(flat)
        if self._row_bytes >= ASKED_AHEAD:
            for part, row in places:
                part.ask_for(row, self._row_bytes)
        for k, (part, row) in enumerate(places):
            part.read(out[k], row, self._row_bytes)
        return out.view(self.dtype).reshape(*asked.shape, *self.shape[1:])

    def __array__(self, dtype: DType | None = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.whole(), dtype)

    def whole(self) -> np.ndarray:
        """All rows."""
        out = np.empty(self.num_bytes, np.uint8)
        pieces = np.split(out, self._ends[:-1] * self._row_bytes)
        for part, own in zip(self._parts, pieces, strict=True):
            part.read(own, 0, self._row_bytes)
        return out.view(self.dtype).reshape(self.shape)

    def _places(self, rows: np.ndarray) -> list[tuple[Part, int]]:
        numbers = np.searchsorted(self._ends, rows, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        local = rows - starts[numbers]
        return [(self._parts[n], k) for n, k in zip(numbers.tolist(), local.tolist(), strict=True)]
