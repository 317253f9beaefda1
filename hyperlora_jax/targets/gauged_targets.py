"""LoRA vectors in a chosen gauge, with the statistics of that gauge.

Datasets hold raw factors; which gauge is learned best is a choice at reading, recorded in `facts`.
    raw         as stored: rows of the dataset's own files
    svd         signs by the inner product with the mean of the svd-gauged training vectors
    procrustes  turned to the mean of the raw training vectors
Turned vectors are kept once, as a memory-mapped .npy beside the statistics of every gauge
(`vectors_summary`).

What one pass over all vectors finds is kept too:
    DATASET/cache/summary-GAUGE-DIGEST.npz   see `beside_dataset`
"""

import dataclasses
import errno
import functools
import hashlib
import logging
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np

from hyperlora_jax.array_types import Float, Int
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import gauge, vectorize
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.targets import beside_dataset
from hyperlora_jax.targets import lora_target_records as record_format
from hyperlora_jax.targets.lora_targets import LoraTargets
from hyperlora_jax.targets.mapped_vectors import MappedFile, MappedVectors, record_starts
from hyperlora_jax.targets.vector_statistics import RunningWhitening, VectorWhitening, factor_slices

log = logging.getLogger(__name__)
SUMMARY_CHUNK = 16  # vectors at a time; another number gives other last digits of the statistics


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """Of the vectors in one gauge, in the order of the dataset's ids.

    Attributes:
        mean, std: statistics of the training split, see `vector_statistics.VectorWhitening`.
        not_finite: rows with a NaN or an infinity.
        mark: see `gauged_targets.GaugedVectors`. reference: of the gauge; [0] for raw.
        files, file_of, starts: where the vectors lie, see `MappedVectors`; empty where they are not
            in files of the dataset as they are.
    """

    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " m"]
    not_finite: Int[np.ndarray, " k"]
    mark: str
    reference: Float[np.ndarray, "_"]
    files: tuple[str, ...] = ()
    file_of: Int[np.ndarray, "_"] = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    starts: Int[np.ndarray, "_"] = dataclasses.field(default_factory=lambda: np.zeros(0, int))


def of_vectors(
    targets: LoraTargets, read: Callable[[slice], Float[np.ndarray, "n d"]]
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " m"], Int[np.ndarray, " k"]]:
    """(mean, std, rows that are not finite) of the vectors read(rows), which go through them."""
    from tqdm import tqdm

    running, not_finite = RunningWhitening(targets.spec), list[int]()
    training = len(training_rows(targets))  # the first ones
    title = f"statistics of {targets.path.name}"
    with tqdm(total=len(targets), desc=title, unit="LoRA", delay=2) as bar:
        for part, counted in ((range(training), True), (range(training, len(targets)), False)):
            for rows in (
                part[start : start + SUMMARY_CHUNK] for start in range(0, len(part), SUMMARY_CHUNK)
            ):
                vectors = read(slice(rows.start, rows.stop))
                finite = np.isfinite(vectors).all(axis=1)
                not_finite += [row for row, good in zip(rows, finite, strict=True) if not good]
                if counted:
                    running.add(vectors)
                bar.update(len(rows))
    whitening = running.result()
    return whitening.mean, whitening.std, np.asarray(not_finite, np.int64)


def training_rows(targets: LoraTargets) -> Int[np.ndarray, " n"]:
    """Rows that statistics are made of: the training split, or all where there is none."""
    return targets.split_indices("train") if "train" in targets.splits else np.arange(len(targets))


def name_of(targets: LoraTargets, kind: str) -> str:
    """GAUGE-DIGEST: another one for every state of the dataset, and for what of it was read."""
    digest = beside_dataset.digest(targets.path)
    if len(targets) != sum(targets.metadata["num_subjects"].values()):
        digest = hashlib.sha256("\n".join([digest, *targets.ids]).encode()).hexdigest()[
            : len(digest)
        ]
    return f"{kind}-{digest}"


def find(places: Sequence[Path], name: str, targets: LoraTargets) -> Summary | None:
    """The kept summary, None without a whole one of this dataset's size."""
    for path in (place / f"summary-{name}.npz" for place in places):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                fields = {key: arrays[key] for key in arrays.files}
            texts = {"mark": str(fields["mark"]), "files": tuple(map(str, fields["files"]))}
            summary = Summary(**{**fields, **texts})
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s: cannot be read and is made again (%s)", path, error)
            continue
        if _fits(summary, targets):
            return summary
        log.warning("%s: is of other LoRAs and is made again", path)
    return None


def _fits(summary: Summary, targets: LoraTargets) -> bool:
    sizes = len(summary.mean), len(summary.std), len(summary.file_of)
    wanted = targets.spec.num_parameters, len(factor_slices(targets.spec)), len(summary.starts)
    return sizes == wanted and len(summary.starts) in (0, len(targets))


def keep(places: Sequence[Path], name: str, summary: Summary) -> None:
    """Writes it into the first folder that can be written; without one the next run repeats it."""
    arrays = {field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}
    try:
        beside_dataset.written(places, f"summary-{name}.npz", lambda file: np.savez(file, **arrays))
    except OSError as error:
        log.warning("statistics of %s are not kept (%s)", name, error)


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
    name = name_of(targets, kind)
    cached = find(places, name, targets)
    summary = _raw_summary(targets) if cached is None and kind == "raw" else cached
    if summary is not None and summary.files:
        files = [MappedFile(targets.path / file) for file in summary.files]
        size = targets.spec.num_parameters
        vectors = MappedVectors(files, summary.file_of, summary.starts, size, targets.lora_dtype)
    else:
        reference = gauge_reference(targets, kind) if summary is None else summary.reference
        vectors = _turned(targets, kind, reference, places, f"vectors-{name}.npy")
        if summary is None:
            statistics = of_vectors(targets, lambda rows: np.asarray(vectors[rows]))
            summary = Summary(*statistics, _mark(targets), reference)
    if cached is None:
        keep(places, name, summary)
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
        stacked = np.stack(vectors)
        if mapped:
            there = MappedVectors(
                files, file_of[rows], starts[rows], stacked.shape[1], targets.lora_dtype
            )
            mapped = there[:].tobytes() == stacked.tobytes()
        return stacked

    statistics = of_vectors(targets, read)
    none, mark = np.zeros(0, np.float32), hashlib.sha256(b"").hexdigest()[:16]
    places = (names, file_of, starts) if mapped else ()
    return Summary(*statistics, mark, none, *places)


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
