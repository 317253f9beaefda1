"""Reading and writing of .safetensors with nothing trusted and nothing random.

A file is u64 header length, JSON header, data. `read` checks every number of the header against
the file before it touches data, and names what is wrong; arrays are views of the mapped file.
`write` gives the same bytes for the same content (sorted names, sorted metadata), copies every
array to C order first (the numpy writer of the safetensors package stores wrong numbers for
transposed views), and replaces the target atomically.
"""

import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hyperlora_jax.array_types import AnyArray
from hyperlora_jax.errors import UserError

Buffer = bytes | np.ndarray
Entry = tuple[np.dtype, tuple[int, ...], int]  # dtype, shape, byte of the file where it starts
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
OWN_MARK, OWN_HASH, KOHYA_HASH = "hyperlora.spec", "hyperlora.sha256", "sshs_model_hash"
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OTHER_KINDS = (
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle or .npz)"),
    (b"\x80", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "HTML or XML text, not weights"),
)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors by name, metadata). Arrays are read-only views of the file.

    Files of our own carry a hash of their data, which is compared. Raises UserError with the file
    and the reason for everything that is not a sound file.
    """
    data = _bytes(path)
    entries, metadata, start = _table(path, data)
    tensors = {
        name: np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)
        for name, (dtype, shape, offset) in entries.items()
    }
    if OWN_MARK in metadata:
        wanted = metadata.get(OWN_HASH, metadata.get(KOHYA_HASH))
        if wanted is None or hashlib.sha256(memoryview(data)[start:]).hexdigest() != wanted:
            raise UserError(f"{path}: damaged or edited: its data is not what its header hashed")
    return tensors, metadata


def read_entries(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """What every tensor is and where; touches no data. Raises UserError as `read` does."""
    return _table(path, _bytes(path))[0]


def read_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """{name: (dtype, shape)}; touches no data."""
    return {name: (dtype, shape) for name, (dtype, shape, _) in read_entries(path).items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header's string metadata, {} when there is none."""
    return read(path)[1]


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, AnyArray], metadata: Mapping[str, str]
) -> None:
    """Writes the file: temporary file beside it, fsync, rename."""
    atomic_write(path, *_parts(tensors, metadata))


def encode(tensors: Mapping[str, AnyArray], metadata: Mapping[str, str]) -> bytes:
    """The bytes of the file.

    Adds the sha256 of the data: as `sshs_model_hash` to a header with ss_ keys, as `OWN_HASH` to
    any other header with our `OWN_MARK`.
    """
    return b"".join(_parts(tensors, metadata))


def _parts(tensors: Mapping[str, AnyArray], metadata: Mapping[str, str]) -> list[Buffer]:
    """Header and data, not yet joined: half of a write's time would be copying."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    order, entries = _layout(arrays)
    # C order, whatever the strides of the array are.
    body = [np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8) for name in order]
    texts = dict(metadata)
    mark = KOHYA_HASH if any(key.startswith("ss_") for key in texts) else OWN_HASH
    if mark == KOHYA_HASH or OWN_MARK in texts:
        hashed = hashlib.sha256()
        for part in body:
            hashed.update(part)
        texts[mark] = hashed.hexdigest()
    return [_header_bytes(entries, texts), *body]


def write_streamed(
    path: str | os.PathLike[str],
    like: Mapping[str, np.ndarray],
    make: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes `make(name)` for every name of `like` (same shape and dtype), one at a time."""
    order, entries = _layout(like)
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


def _layout(arrays: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, Any]]:
    """(order of the data, header entries); wide dtypes first keeps every tensor aligned."""
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    entries, offset = {}, 0
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise ValueError(f"safetensors cannot hold dtype {array.dtype} of {name}")
        entries[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    return order, entries


def _header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    if not all(isinstance(key, str) and isinstance(text, str) for key, text in metadata.items()):
        raise ValueError(f"safetensors metadata must be strings, got {metadata!r}")
    header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps({**header, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def atomic_write(path: str | os.PathLike[str], *parts: Buffer) -> None:
    """Puts the joined parts at the path in one step: temporary file, fsync, rename."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot write here ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb", buffering=1 << 18) as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(target)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{target}: cannot write here ({error.strerror})") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _bytes(path: str | os.PathLike[str]) -> bytes | mmap.mmap:
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UserError(f"{path}: empty file, expected a .safetensors file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason})") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return result


def _header(path: str | os.PathLike[str], data: bytes | mmap.mmap) -> tuple[dict[str, Any], int]:
    for magic, kind in _OTHER_KINDS:
        if data[: len(magic)] == magic and data[8:9] != b"{":
            raise UserError(f"{path}: {kind}, expected a .safetensors file")
    if len(data) < 10:
        raise UserError(f"{path}: {len(data)} bytes are too few for a .safetensors file")
    size = int.from_bytes(data[:8], "little")
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise UserError(f"{path}: header of {size} bytes in a file of {len(data)}; cut off?")
    try:
        header = json.loads(data[8 : 8 + size].decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: header is no valid JSON ({str(error)[:80]})") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: header is no JSON object")
    return header, 8 + size


def _table(
    path: str | os.PathLike[str], data: bytes | mmap.mmap
) -> tuple[dict[str, Entry], dict[str, str], int]:
    """(entries, metadata, where the data starts), every number checked against the file."""
    header, start = _header(path, data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: __metadata__ is no map of strings to strings")
    entries, spans = {}, []
    for name, found in header.items():
        dtype, shape, begin, end = _entry(path, name, found, len(data) - start)
        spans.append((begin, end, name))
        entries[name] = (dtype, shape, start + begin)
    _check_spans(path, sorted(spans), len(data) - start)
    return entries, metadata, start


def _are_indices(values: Any, most: int) -> bool:
    # `type` rather than isinstance: true and false are no numbers.
    return (
        type(values) is list
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**62 for value in values)
    )


def _entry(
    path: str | os.PathLike[str], name: str, entry: Any, size: int
) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: entry of {name!r} needs dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: {name!r} has unsupported dtype {str(entry['dtype'])[:20]!r}")
    if not _are_indices(shape, MAX_DIMENSIONS):
        raise UserError(f"{path}: {name!r} has shape {str(shape)[:60]}, expected a few sizes")
    if not _are_indices(offsets, 2) or len(offsets) != 2:
        raise UserError(f"{path}: {name!r} has data_offsets {str(offsets)[:60]}")
    begin, end = offsets
    dtype = DTYPES[entry["dtype"]]
    count = math.prod(shape)
    if not begin <= end <= size:
        raise UserError(f"{path}: {name!r} lies outside the file ({begin}..{end} of {size} bytes)")
    if end - begin != count * dtype.itemsize:
        raise UserError(
            f"{path}: {name!r} has {end - begin} bytes, its shape {shape} needs "
            f"{count * dtype.itemsize}"
        )
    return dtype, tuple(shape), begin, end


def _check_spans(
    path: str | os.PathLike[str], spans: list[tuple[int, int, str]], size: int
) -> None:
    """Tensors must cover the data exactly, without overlap or hole."""
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            kind = "overlaps another tensor" if begin < expected else "leaves a hole before it"
            raise UserError(f"{path}: {name!r} {kind} (starts at {begin}, expected {expected})")
        expected = end
    if expected != size:
        raise UserError(f"{path}: {size - expected} bytes after the last tensor")
