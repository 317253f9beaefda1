"""LoRA vectors in a chosen gauge, with the statistics of that gauge.

Datasets hold raw factors; which gauge is learned best is a choice at reading, recorded in `facts`.
    raw         as stored: rows of the dataset's own files
    svd         signs by the inner product with the mean of the svd-gauged training vectors
    procrustes  turned to the mean of the raw training vectors
Turned vectors are kept once, as a memory-mapped .npy beside the statistics of every gauge
(`vectors_summary`).
"""

import dataclasses
import errno
import functools
import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np

from hyperlora_jax.array_types import Float, Int
from hyperlora_jax.data import beside_dataset, vectors_summary
from hyperlora_jax.data import lora_target_records as record_format
from hyperlora_jax.data.lora_targets import LoraTargets
from hyperlora_jax.data.mapped_vectors import MappedFile, MappedVectors, record_starts
from hyperlora_jax.data.vector_statistics import VectorWhitening
from hyperlora_jax.data.vectors_summary import Summary, training_rows
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import gauge, vectorize
from hyperlora_jax.lora.sites import LoraSpec

log = logging.getLogger(__name__)
GAUGES = ("raw", "svd", "procrustes")
CHUNK = 16  # vectors turned by one call: more fall out of the cache
REFERENCE_VECTORS = 512  # of the training split, for the mean of the svd gauge


@dataclasses.dataclass(frozen=True, eq=False)
class GaugedVectors:
    """Vectors of a dataset in one gauge, in the order of its ids.

    Attributes:
        kind: the gauge. vectors: float32, memory-mapped: an array, or what is indexed like one.
        reference: what signs or rotations were chosen by, None for raw.
        whitening: statistics of the training split in this gauge.
        not_finite: rows with numbers that are not finite.
        mark: of the LoRAs that the reference was made from, as they are stored: the reference
            itself differs in its last digits from one machine to another.
    """

    kind: str
    vectors: Float[np.ndarray, "n d"] | MappedVectors
    reference: Float[np.ndarray, " d"] | None
    whitening: VectorWhitening
    not_finite: Int[np.ndarray, " k"]
    mark: str

    def facts(self) -> dict:
        """What a checkpoint records about the gauge."""
        return {"gauge": self.kind, "gauge_reference": self.mark}


def read_in_gauge(
    targets: LoraTargets, kind: str = "raw", cache_dir: str | Path | None = None
) -> GaugedVectors:
    """All vectors of a dataset in a gauge. What takes a look at all of them is done once and kept
    in the dataset's folder, or in `cache_dir` where that cannot be written.

    Raises:
        UserError: an unknown gauge, a damaged dataset, no place for turned vectors.
    """
    if kind not in GAUGES:
        raise UserError(f"gauge is {kind!r}, expected one of {', '.join(GAUGES)}")
    places = beside_dataset.folders(targets.path, cache_dir)
    name = vectors_summary.name_of(targets, kind)
    known = vectors_summary.find(places, name, targets)
    summary = _raw_summary(targets) if known is None and kind == "raw" else known
    if summary is not None and summary.files:
        files = [MappedFile(targets.path / file) for file in summary.files]
        size = targets.spec.num_parameters
        vectors = MappedVectors(files, summary.file_of, summary.starts, size, targets.lora_dtype)
    else:
        reference = gauge_reference(targets, kind) if summary is None else summary.reference
        vectors = _turned(targets, kind, reference, places, f"vectors-{name}.npy")
        if summary is None:
            found = vectors_summary.of_vectors(targets, lambda rows: np.asarray(vectors[rows]))
            summary = Summary(*found, _mark(targets), reference)
    if known is None:
        vectors_summary.keep(places, name, summary)
    reference = None if kind == "raw" else summary.reference
    whitening = VectorWhitening(summary.mean, summary.std)
    return GaugedVectors(kind, vectors, reference, whitening, summary.not_finite, summary.mark)


def _raw_summary(targets: LoraTargets) -> Summary:
    """Reads every vector as ArrayRecord does, which notices damage, and finds it in its file."""
    targets.loras([])  # says so where there are none
    paths, file_of, numbers = targets.files()
    used, file_of = np.unique(file_of, return_inverse=True)
    names = tuple(paths[k].name for k in used)
    starts = np.zeros(len(targets), np.int64)
    try:
        files = [MappedFile(targets.path / name) for name in names]
        starts = record_starts(files, file_of, numbers)
        mapped = True
    except (OSError, ValueError) as error:
        log.info("%s: its vectors cannot be mapped (%s)", targets.path, error)
        files, mapped = [], False

    def parse(record: bytes, _: str) -> tuple[int, np.ndarray]:
        vector = record_format.parse_vector(record, targets.lora_dtype)
        return record_format.find_vector(record)[0], vector

    def read(rows: slice) -> np.ndarray:
        nonlocal mapped
        offsets, vectors = zip(
            *(targets.read(row, parse) for row in range(rows.start, rows.stop)), strict=True
        )
        starts[rows] += offsets
        found = np.stack(vectors)
        if mapped:
            there = MappedVectors(
                files, file_of[rows], starts[rows], found.shape[1], targets.lora_dtype
            )
            mapped = there[:].tobytes() == found.tobytes()
        return found

    found = vectors_summary.of_vectors(targets, read)
    none, mark = np.zeros(0, np.float32), hashlib.sha256(b"").hexdigest()[:16]
    places = (names, file_of, starts) if mapped else ()
    return Summary(*found, mark, none, *places)


def _mark(targets: LoraTargets) -> str:
    chosen = training_rows(targets)
    stored = targets.loras(chosen[:REFERENCE_VECTORS])
    text = np.ascontiguousarray(stored).tobytes() + str(len(chosen)).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def gauge_reference(targets: LoraTargets, kind: str) -> Float[np.ndarray, " d"] | None:
    """The vector that signs (svd) or rotations (procrustes) are chosen by."""
    if kind == "raw":
        return None
    if kind == "procrustes":
        return targets.whitening().mean
    some = training_rows(targets)[:REFERENCE_VECTORS]
    return turn_vectors(targets.loras(some), targets.spec, "svd").mean(axis=0)


def turn_vectors(
    vectors: Float[np.ndarray, "n d"],
    spec: LoraSpec,
    kind: str,
    reference: Float[np.ndarray, " d"] | None = None,
) -> Float[np.ndarray, "n d"]:
    """Flat vectors in a gauge: one compiled call, sites of one shape together."""
    return np.asarray(_turn(vectors, reference, spec, kind))


@functools.partial(jax.jit, static_argnames=("spec", "kind"))
def _turn(vectors, reference, spec: LoraSpec, kind: str):
    target = None if reference is None else vectorize.unflatten(reference, spec)
    lora = vectorize.unflatten(vectors, spec)
    return vectorize.flatten(gauge.canonical(lora, spec, kind, target), spec)


def _turned(
    targets: LoraTargets, kind: str, reference, places: Sequence[Path], name: str
) -> Float[np.ndarray, "n d"]:
    """All vectors in a gauge, from the file `name` of one of the folders, or written there."""
    shape = (len(targets), targets.spec.num_parameters)
    for path in (place / name for place in places):
        try:
            vectors = np.load(path, mmap_mode="r")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, EOFError) as error:
            log.warning("%s: cannot be read and is made again (%s)", path, error)
            continue
        if vectors.shape == shape:
            return vectors
        log.warning("%s: is of other LoRAs and is made again", path)

    def write(file: BinaryIO) -> None:
        needed = 4 * shape[0] * shape[1]
        free = shutil.disk_usage(Path(file.name).parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed} bytes needed, {free} free")
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        size = min(CHUNK, len(targets))
        for start in range(0, len(targets), size):
            stop = min(start + size, len(targets))
            # The first rows again at the end of a short chunk: one shape for compiled functions.
            rows = targets.loras([*range(start, stop), *([start] * (size - (stop - start)))])
            if kind != "raw":
                rows = turn_vectors(rows, targets.spec, kind, reference)
            file.write(np.ascontiguousarray(rows[: stop - start], np.float32).data)

    try:
        path = beside_dataset.written(places, name, write)
    except OSError as error:
        shown = " and ".join(map(str, places))
        raise UserError(f"{shown}: cannot write turned vectors there ({error})") from None
    return np.load(path, mmap_mode="r")
