"""Tables in .safetensors files of which only the rows that are asked for are read.

The rows of a table are those of its files in turn. Files are mapped into memory: their pages are
the operating system's, which takes them back when it needs room. Those that were read are let go
of again, which keeps the resident memory small however large the files are. Small files are read
whole: many short rows are faster from one array.
"""

import dataclasses
import mmap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io

WHOLE_BYTES = 2**29  # of files that are read whole
LET_GO_BYTES = 2**26  # read rows whose pages may stay mapped
PAGES_AROUND = 2**16  # bytes that Linux maps beside what a row touches
ASKED_AHEAD = 2**16  # bytes of a row from which on a batch's rows are asked of the disk at once


class RowFiles:
    """The tables of some files.

    Raises:
        UserError: a file is damaged, or has other tables than the first.
    """

    def __init__(self, files: Sequence[Path]):
        self._maps: list[mmap.mmap] = []
        self._parts: dict[str, list[Part]] = {}
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._read, self._lock = 0, threading.Lock()
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        entries = safetensors_io.read_entries(file)
        try:
            with file.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        found = {name: (dtype, shape[1:]) for name, (dtype, shape, _) in entries.items()}
        if self._maps and found != self._kinds:
            raise UserError(f"{file}: holds {found}, the files before it {self._kinds}")
        self._kinds = found
        self._maps.append(mapped)
        for name, (dtype, shape, start) in entries.items():
            kind = _plain(dtype)
            part = np.frombuffer(mapped, kind, int(np.prod(shape)), start).reshape(shape)
            self._parts.setdefault(name, []).append(Part(part, mapped, start))

    def tables(self) -> dict[str, "Rows | np.ndarray"]:
        """All tables by name."""
        found = {
            name: Rows(self, parts, self._kinds[name][0]) for name, parts in self._parts.items()
        }
        if sum(map(len, self._maps)) > WHOLE_BYTES:
            return dict(found)
        return {name: rows.whole() for name, rows in found.items()}

    def note(self, num_bytes: int) -> None:
        """Says that so much was read; lets go of the pages once it is enough."""
        with self._lock:
            self._read += num_bytes
            if self._read < LET_GO_BYTES:
                return
            self._read = 0
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Rows of one file: an array of mapped bytes (bfloat16 as integers) that begins at `start`."""

    rows: np.ndarray
    mapped: mmap.mmap
    start: int

    def ask_for(self, row: int) -> None:
        """Has the disk read a row, without waiting for it."""
        size = self.rows[0].nbytes
        first = self.start + row * size
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        self.mapped.madvise(mmap.MADV_WILLNEED, page, first + size - page)


class Rows:
    """Looks like an array [rows, ...]; rows are read when they are asked for."""

    def __init__(self, files: RowFiles, parts: Sequence[Part], dtype: Any):
        self._files, self._parts, self.dtype = files, list(parts), np.dtype(dtype)
        self._ends = np.cumsum([len(part.rows) for part in parts])
        self._kind = parts[0].rows.dtype
        self.shape = (int(self._ends[-1]), *parts[0].rows.shape[1:])
        self.ndim = len(self.shape)
        self._row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """A row, a slice of rows, or rows by an array of numbers of any shape."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        asked = np.asarray(index)
        flat = asked.reshape(-1).astype(np.int64)
        if len(flat) and not (flat.min() >= 0 and flat.max() < len(self)):
            raise IndexError(f"rows {flat.min()} to {flat.max()} of {len(self)}")
        out = np.empty((len(flat), *self.shape[1:]), self._kind)
        places = self._places(flat)
        if self._row_bytes >= ASKED_AHEAD:
            for part, row in places:
                part.ask_for(row)
        for k, (part, row) in enumerate(places):
            out[k] = part.rows[row]
        self._files.note(len(flat) * (self._row_bytes + PAGES_AROUND))
        return out.view(self.dtype).reshape(*asked.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.whole(), dtype)

    def whole(self) -> np.ndarray:
        """All rows."""
        return np.concatenate([part.rows for part in self._parts]).view(self.dtype)

    def _places(self, rows: np.ndarray) -> list[tuple[Part, int]]:
        numbers = np.searchsorted(self._ends, rows, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        local = rows - starts[numbers]
        return [(self._parts[n], k) for n, k in zip(numbers.tolist(), local.tolist(), strict=True)]


def _plain(dtype: np.dtype) -> np.dtype:
    """A dtype that numpy knows itself, and therefore copies fast, for one that it does not."""
    return np.dtype(np.uint16) if dtype == ml_dtypes.bfloat16 else dtype
