"""Reading and writing of .safetensors with nothing trusted and nothing random.

A file is u64 header length, JSON header, data. `read` checks every number of the header against
the file before it touches data, and names what is wrong; arrays are views of the mapped file.
`write` gives the same bytes for the same content (sorted names, sorted metadata), copies every
array to C order first (the numpy writer of the safetensors package stores wrong numbers for
transposed views), and replaces the target atomically.

A layout says where the tensors lie: names, dtypes, shapes and bytes, without the data. The LoRAs of
one hypernetwork differ in their numbers and their metadata only, so the layout that a header
describes is checked once and kept, and so is the text that describes it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import ml_dtypes
import numpy as np

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json, Params
from hyperlora_jax.errors import UserError

MAX_DIMENSIONS = 8
METADATA = "__metadata__"
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_START = '{"' + METADATA + '":'
# What is kept: the headers of a few kinds of LoRA, never a large foreign one.
_KEPT_BYTES = 1 << 20
Signature = tuple[tuple[str, np.dtype, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor: what it is, and its first byte in the data."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    count: int

    @property
    def end(self) -> int:
        """Byte after its last one."""
        return self.begin + self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tensors in the order of their data, which they cover without hole or overlap."""

    places: tuple[Place, ...]
    num_bytes: int


def signature(tensors: Params) -> Signature:
    """All of a set of tensors but their numbers."""
    return tuple((name, array.dtype, array.shape) for name, array in tensors.items())


@functools.lru_cache(maxsize=64)
def describe(tensors: Signature) -> tuple[tuple[str, ...], str]:
    """(order of the data, header entries without braces); wide dtypes first keeps all aligned."""
    entries, offset = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda row: (-row[1].itemsize, row[0])):
        if dtype not in _NAMES:
            raise ValueError(f"safetensors cannot hold dtype {dtype} of {name}")
        end = offset + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        entries[name], offset = entry, end
    return tuple(entries), _json(entries)[1:-1]


def header_text(entries: str, metadata: Mapping[str, str]) -> str:
    """The whole header: metadata first, sorted, then the entries of `describe`."""
    if not all(isinstance(key, str) and isinstance(text, str) for key, text in metadata.items()):
        raise ValueError(f"safetensors metadata must be strings, got {metadata!r}")
    first = f'"{METADATA}":{_json(dict(sorted(metadata.items())))}' if metadata else ""
    return f"{{{first}{',' if first and entries else ''}{entries}}}"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def parse(text: str) -> tuple[Layout, dict[str, str]]:
    """(layout, metadata) of a header's text. Raises UserError, without the file's name."""
    try:
        metadata, rest = _split(text)
        layout, inner = (_parse if len(rest) < _KEPT_BYTES else _parse.__wrapped__)(rest)
    except (ValueError, RecursionError) as error:
        raise UserError(f"header is no valid JSON ({str(error)[:80]})") from error
    if metadata is not None and inner is not None:
        raise UserError(f"header is no valid JSON ({METADATA!r} appears twice)")
    metadata = inner if metadata is None else metadata
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{METADATA} is no map of strings to strings")
    return layout, metadata


def _split(text: str) -> tuple[Json | None, str]:
    """Takes out metadata that come first, as all common writers put them: (metadata, rest)."""
    if not text.startswith(_START + "{"):
        return None, text
    metadata, end = _DECODER.raw_decode(text, len(_START))
    return (metadata, "{" + text[end + 1 :]) if text[end : end + 2] == ',"' else (None, text)


@functools.lru_cache(maxsize=16)
def _parse(text: str) -> tuple[Layout, object]:
    """(layout, metadata inside the text or None)."""
    header = _DECODER.decode(text)
    if not isinstance(header, dict):
        raise UserError("header is no JSON object")
    metadata = header.pop(METADATA, None)
    places = sorted(
        (_place(name, entry) for name, entry in header.items()),
        key=lambda place: (place.begin, place.end, place.name),
    )
    expected = 0
    for place in places:
        if place.begin != expected:
            kind = "overlaps another tensor" if place.begin < expected else "leaves a hole before"
            raise UserError(f"{place.name!r} {kind} (starts at {place.begin}, expected {expected})")
        expected = place.end
    return Layout(tuple(places), expected), metadata


def _no_duplicates(pairs: list[tuple[str, object]]) -> Json:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _are_indices(values: object, most: int) -> bool:
    # `type` rather than isinstance: true and false are no numbers.
    return (
        type(values) is list
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**62 for value in values)
    )


def _place(name: str, entry: object) -> Place:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"entry of {name!r} needs dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise UserError(f"{name!r} has unsupported dtype {str(entry['dtype'])[:20]!r}")
    if not _are_indices(shape, MAX_DIMENSIONS):
        raise UserError(f"{name!r} has shape {str(shape)[:60]}, expected a few sizes")
    if not _are_indices(offsets, 2) or len(offsets) != 2:
        raise UserError(f"{name!r} has data_offsets {str(offsets)[:60]}")
    begin, end = offsets
    dtype, count = DTYPES[entry["dtype"]], math.prod(shape)
    if end - begin != count * dtype.itemsize:
        raise UserError(
            f"{name!r} has {end - begin} bytes, its shape {shape} needs {count * dtype.itemsize}"
        )
    return Place(name, dtype, tuple(shape), begin, count)


Buffer = bytes | np.ndarray
Entry = tuple[np.dtype, tuple[int, ...], int]  # dtype, shape, byte of the file where it starts
MAX_HEADER_BYTES = 100_000_000
OWN_MARK, OWN_HASH, KOHYA_HASH = "hyperlora.spec", "hyperlora.sha256", "sshs_model_hash"
_OTHER_KINDS = (
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle, which may run code when it is read)"),
    (b"\x80", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "HTML or XML text, not weights"),
)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors by name, metadata). Arrays are read-only views of the file.

    Files of our own carry a hash of their data, which is compared. Raises UserError with the file
    and the reason for everything that is not a sound file.
    """
    data = _bytes(path)
    layout, metadata, start = _header(path, data)
    tensors = {
        place.name: np.frombuffer(data, place.dtype, place.count, start + place.begin).reshape(
            place.shape
        )
        for place in layout.places
    }
    if OWN_MARK in metadata:
        wanted = metadata.get(OWN_HASH, metadata.get(KOHYA_HASH))
        if wanted is None or hashlib.sha256(memoryview(data)[start:]).hexdigest() != wanted:
            raise UserError(f"{path}: damaged or edited: its data is not what its header hashed")
    return tensors, metadata


def read_entries(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """What every tensor is and where; touches no data. Raises UserError as `read` does."""
    layout, _, start = _header(path, _bytes(path))
    return {place.name: (place.dtype, place.shape, start + place.begin) for place in layout.places}


def read_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """{name: (dtype, shape)}; touches no data."""
    return {name: (dtype, shape) for name, (dtype, shape, _) in read_entries(path).items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header's string metadata, {} when there is none; touches no data."""
    return _header(path, _bytes(path))[1]


def write(path: str | os.PathLike[str], tensors: Params, metadata: Mapping[str, str]) -> None:
    """Writes the file: temporary file beside it, fsync, rename."""
    atomic_write(path, *_parts(tensors, metadata))


def encode(tensors: Params, metadata: Mapping[str, str]) -> bytes:
    """The bytes of the file.

    Adds the sha256 of the data: as `sshs_model_hash` to a header with ss_ keys, as `OWN_HASH` to
    any other header with our `OWN_MARK`.
    """
    return b"".join(cast(list[bytes], _parts(tensors, metadata)))


def _parts(tensors: Params, metadata: Mapping[str, str]) -> list[Buffer]:
    """[header, data], not joined: the data would be copied once more."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    order, entries = describe(signature(arrays))
    # In C order, whatever the strides of an array are.
    parts = [np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8) for name in order]
    data = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    texts = dict(metadata)
    mark = KOHYA_HASH if any(key.startswith("ss_") for key in texts) else OWN_HASH
    if mark == KOHYA_HASH or OWN_MARK in texts:
        texts[mark] = hashlib.sha256(data.data).hexdigest()
    return [_header_bytes(entries, texts), data]


def write_streamed(
    path: str | os.PathLike[str],
    like: Mapping[str, np.ndarray],
    make: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes `make(name)` for every name of `like` (same shape and dtype), one at a time."""
    order, entries = describe(signature(like))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    with temporary.open("wb") as file:
        file.write(_header_bytes(entries, metadata))
        for name in order:
            array = make(name)
            if array.shape != like[name].shape or array.dtype != like[name].dtype:
                raise ValueError(f"{name}: {array.dtype}{array.shape}, expected that of `like`")
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


@contextlib.contextmanager
def written_in_rows(
    path: str | os.PathLike[str], signature: Signature
) -> Iterator[Callable[[str, int, np.ndarray], None]]:
    """A function that puts rows of a tensor (its name, the first row's number, the rows) into a
    file, which appears at the path when the block ends, and not when it fails.

    Raises UserError where the file cannot be written.
    """
    order, entries = describe(signature)
    kinds = {name: (dtype, shape) for name, dtype, shape in signature}
    header = _header_bytes(entries, {})
    starts, end = {}, len(header)
    for name in order:
        starts[name] = end
        end += math.prod(kinds[name][1]) * kinds[name][0].itemsize
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
    with _named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb", buffering=0)
        file.write(header)
        file.truncate(end)

    def put(name: str, first: int, rows: np.ndarray) -> None:
        dtype, shape = kinds[name]
        if rows.shape[1:] != shape[1:] or rows.dtype != dtype or first + len(rows) > shape[0]:
            raise ValueError(f"{name}: rows {rows.dtype}{rows.shape} for {dtype}{shape}")
        with _named(target):
            file.seek(starts[name] + first * math.prod(shape[1:]) * dtype.itemsize)
            storage.write_all(file.fileno(), np.ascontiguousarray(rows).reshape(-1).view(np.uint8))

    with file:
        yield put
        with _named(target):
            os.fsync(file.fileno())
    with _named(target):
        temporary.replace(target)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error


def _header_bytes(entries: str, metadata: Mapping[str, str]) -> bytes:
    text = header_text(entries, metadata).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def atomic_write(path: str | os.PathLike[str], *parts: Buffer) -> None:
    """Puts the joined parts at a path, on the disk or in a bucket, in one step; makes its folder.

    Raises UserError where it cannot be written.
    """
    target = storage.place(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.replaced(target, *parts)
    except Exception as error:  # a bucket's file system has errors of its own
        raise UserError(f"{target}: cannot write here ({storage.reason(error)})") from error


def _bytes(path: str | os.PathLike[str]) -> bytes | mmap.mmap:
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UserError(f"{path}: empty file, expected a .safetensors file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason})") from error


def other_kind(data: bytes | mmap.mmap) -> str:
    """What a file is that begins with these bytes, in words; "" for none of the known kinds."""
    return next((kind for magic, kind in _OTHER_KINDS if data[: len(magic)] == magic), "")


def _header(
    path: str | os.PathLike[str], data: bytes | mmap.mmap
) -> tuple[Layout, dict[str, str], int]:
    """(layout, metadata, first byte of the data)."""
    if data[8:9] != b"{" and (kind := other_kind(data)):
        raise UserError(f"{path}: {kind}, expected a .safetensors file")
    if len(data) < 10:
        raise UserError(f"{path}: {len(data)} bytes are too few for a .safetensors file")
    size = int.from_bytes(data[:8], "little")
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise UserError(f"{path}: header of {size} bytes in a file of {len(data)}; cut off?")
    try:
        layout, metadata = parse(data[8 : 8 + size].decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: header is no valid JSON ({str(error)[:80]})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    rest = len(data) - 8 - size - layout.num_bytes
    if rest < 0:
        last = layout.places[-1]
        raise UserError(
            f"{path}: {last.name!r} lies outside the file (ends at {last.end} of "
            f"{len(data) - 8 - size} bytes)"
        )
    if rest:
        raise UserError(f"{path}: {rest} bytes after the last tensor")
    return layout, metadata, 8 + size
