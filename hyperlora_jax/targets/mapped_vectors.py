"""LoRA vectors as memory-mapped rows of the ArrayRecord files that hold them: no second copy.

An ArrayRecord file is a Riegeli file (github.com/google/riegeli, records_file_format.md): blocks
of 64 KiB, each with a header of 24 bytes, through which chunks run on; a chunk is a header of 40
bytes and its data. Our writer puts one record into a chunk, uncompressed, so a vector lies in the
file as it is, but for the headers of blocks. Positions here are "logical": without these headers.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import DType, Float, Index, Int, UInt8

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 2**16, 24, 40
ROOM = BLOCK - BLOCK_HEADER
RECORDS = ord("r")  # the kind of a chunk that holds records
STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}


class MappedFile:
    """The bytes of a Riegeli file without the headers of its blocks."""

    def __init__(self, path: Path):
        whole = path.stat().st_size // BLOCK
        if not whole:
            raise ValueError(f"{path}: is shorter than one block")
        mapped = np.memmap(path, np.uint8, "r", shape=(whole, BLOCK))
        self._blocks = mapped[:, BLOCK_HEADER:]

    def copy(self, start: int, out: UInt8[np.ndarray, " n"]) -> None:
        """Fills `out` with the bytes from a logical position on; ValueError beyond the end."""
        block, offset = divmod(start, ROOM)
        head = min(ROOM - offset, len(out))
        whole, tail = divmod(len(out) - head, ROOM)
        if not 0 <= start + len(out) <= self._blocks.size:
            raise ValueError(f"{len(out)} bytes at {start} of {self._blocks.size}")
        out[:head] = self._blocks[block, offset : offset + head]
        if whole:
            middle = out[head : head + whole * ROOM].reshape(whole, ROOM)
            middle[...] = self._blocks[block + 1 : block + 1 + whole]
        if tail:
            out[-tail:] = self._blocks[block + 1 + whole, :tail]

    def records(self) -> Iterator[int]:
        """Logical positions of the records, one after another.

        Raises ValueError where the file holds them in another way: together, or compressed.
        """
        position, header = 0, np.empty(CHUNK_HEADER + 1, np.uint8)
        while True:
            self.copy(position, header)
            # Hashes at 0 and 16, size at 8, kind and number of records at 24, content size at 32.
            size, number, content = (
                int.from_bytes(header[a:b].tobytes(), "little")
                for a, b in ((8, 16), (25, 32), (32, 40))
            )
            end = position + CHUNK_HEADER + size
            if header[24] == RECORDS:
                if number != 1 or header[CHUNK_HEADER] != 0 or content > size:
                    raise ValueError(f"{number} records at {position}, expected 1 uncompressed")
                yield end - content
            position = end


def record_starts(
    files: Sequence[MappedFile], file_of: Int[np.ndarray, " n"], numbers: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Logical positions of records, given by file and number in it; ValueError as `records`."""
    starts = np.empty(len(numbers), np.int64)
    for k, file in enumerate(files):
        wanted = numbers[file_of == k]
        first_ones = itertools.islice(file.records(), int(wanted.max()) + 1)
        starts[file_of == k] = np.fromiter(first_ones, np.int64)[wanted]
    return starts


class MappedVectors:
    """Looks like an array [n, d] of float32; rows are copied out of files at every access.

    Args:
        files: ArrayRecord files. file_of: which of them a row lies in.
        starts: where its bytes begin there, logically.
        size: numbers of a vector. stored: as what, "float32" or "bfloat16".
    """

    def __init__(
        self,
        files: Sequence[MappedFile],
        file_of: Int[np.ndarray, " n"],
        starts: Int[np.ndarray, " n"],
        size: int,
        stored: str,
    ):
        self._files, self._file_of, self._starts = files, file_of, starts
        self._stored = STORED[stored]
        self.shape, self.dtype, self.ndim = (len(starts), size), np.dtype(np.float32), 2

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Index) -> Float[np.ndarray, "*b d"]:
        chosen = np.arange(len(self))[index]
        rows = np.atleast_1d(chosen)
        vectors = np.empty((len(rows), self.shape[1]), self._stored)
        for row, out in zip(rows, vectors.view(np.uint8), strict=True):
            self._files[int(self._file_of[row])].copy(int(self._starts[row]), out)
        if self._stored != self.dtype:
            vectors = (vectors.astype(np.uint32) << 16).view(np.float32)
        return vectors if chosen.ndim else vectors[0]

    def __array__(self, dtype: DType | None = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self[:], dtype)
