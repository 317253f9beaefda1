"""Where the tensors of a .safetensors file lie: names, dtypes, shapes and bytes, without the data.

The LoRAs of one hypernetwork differ in their numbers and their metadata only, so the layout that
a header describes is checked once and kept, and so is the text that describes it.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hyperlora_jax.array_types import AnyArray
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


def signature(tensors: Mapping[str, AnyArray]) -> Signature:
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


def _json(value: Any) -> str:
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


def _split(text: str) -> tuple[Any, str]:
    """Takes out metadata that come first, as all common writers put them: (metadata, rest)."""
    if not text.startswith(_START + "{"):
        return None, text
    metadata, end = _DECODER.raw_decode(text, len(_START))
    return (metadata, "{" + text[end + 1 :]) if text[end : end + 2] == ',"' else (None, text)


@functools.lru_cache(maxsize=16)
def _parse(text: str) -> tuple[Layout, Any]:
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


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _are_indices(values: Any, most: int) -> bool:
    # `type` rather than isinstance: true and false are no numbers.
    return (
        type(values) is list
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**62 for value in values)
    )


def _place(name: str, entry: Any) -> Place:
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
