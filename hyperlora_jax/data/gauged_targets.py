"""LoRA vectors in a chosen gauge, with the statistics of that gauge.

Datasets hold raw factors; which gauge is learned best is a choice at reading, recorded in `facts`.
    raw         as stored
    svd         signs by the inner product with the mean of the svd-gauged training vectors
    procrustes  turned to the mean of the raw training vectors
The result can be cached as a memory-mapped .npy, so that training draws from it like any array.
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import jax
import numpy as np

from hyperlora_jax.array_types import Float
from hyperlora_jax.data.lora_targets import LoraTargets
from hyperlora_jax.data.vector_statistics import RunningWhitening, VectorWhitening
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import gauge, vectorize
from hyperlora_jax.lora.sites import LoraSpec

GAUGES = ("raw", "svd", "procrustes")
CHUNK = 16  # vectors turned by one call: more fall out of the cache
REFERENCE_VECTORS = 512  # of the training split, for the mean of the svd gauge


@dataclasses.dataclass(frozen=True, eq=False)
class GaugedVectors:
    """Vectors of a dataset in one gauge, in the order of its ids.

    Attributes:
        kind: the gauge. vectors: float32, maybe memory-mapped.
        reference: what signs or rotations were chosen by, None for raw.
        whitening: statistics of the training split in this gauge.
        mark: of the LoRAs that the reference was made from, as they are stored: the reference
            itself differs in its last digits from one machine to another.
    """

    kind: str
    vectors: Float[np.ndarray, "n d"]
    reference: Float[np.ndarray, " d"] | None
    whitening: VectorWhitening
    mark: str

    def facts(self) -> dict:
        """What a checkpoint records about the gauge."""
        return {"gauge": self.kind, "gauge_reference": self.mark}


def read_in_gauge(
    targets: LoraTargets, kind: str = "raw", cache_dir: str | Path | None = None
) -> GaugedVectors:
    """All vectors of a dataset in a gauge; computed once when there is a `cache_dir`."""
    if kind not in GAUGES:
        raise UserError(f"gauge is {kind!r}, expected one of {', '.join(GAUGES)}")
    reference = gauge_reference(targets, kind)
    shape = (len(targets), targets.spec.num_parameters)
    if cache_dir is None:
        vectors = np.empty(shape, np.float32)
        _fill(vectors, targets, kind, reference)
        statistics = _statistics(vectors, targets)
        return GaugedVectors(kind, vectors, reference, statistics, _mark(targets, kind))
    path = Path(cache_dir) / f"vectors-{kind}-{_content_hash(targets)}.npy"
    if not path.exists():
        _write_cache(path, shape, targets, kind, reference)
    vectors = np.load(path, mmap_mode="r")
    statistics = _statistics(vectors, targets)
    return GaugedVectors(kind, vectors, reference, statistics, _mark(targets, kind))


def _mark(targets: LoraTargets, kind: str) -> str:
    text = b""
    if kind != "raw":
        chosen = _training(targets)
        stored = targets.loras(chosen[:REFERENCE_VECTORS])
        text = np.ascontiguousarray(stored).tobytes() + str(len(chosen)).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def gauge_reference(targets: LoraTargets, kind: str) -> Float[np.ndarray, " d"] | None:
    """The vector that signs (svd) or rotations (procrustes) are chosen by."""
    if kind == "raw":
        return None
    if kind == "procrustes":
        return targets.whitening().mean
    some = _training(targets)[:REFERENCE_VECTORS]
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


def _fill(out: np.ndarray, targets: LoraTargets, kind: str, reference) -> None:
    size = min(CHUNK, len(targets))
    for start in range(0, len(targets), size):
        stop = min(start + size, len(targets))
        # The first rows again at the end of a short chunk: one shape for the compiled functions.
        vectors = targets.loras([*range(start, stop), *([start] * (size - (stop - start)))])
        if kind != "raw":
            vectors = turn_vectors(vectors, targets.spec, kind, reference)
        out[start:stop] = vectors[: stop - start]


def _training(targets: LoraTargets) -> np.ndarray:
    return targets.split_indices("train") if "train" in targets.splits else np.arange(len(targets))


def _statistics(vectors: np.ndarray, targets: LoraTargets) -> VectorWhitening:
    running = RunningWhitening(targets.spec)
    chosen = _training(targets)
    for start in range(0, len(chosen), CHUNK):
        running.add(np.asarray(vectors[chosen[start : start + CHUNK]]))
    return running.result()


def _content_hash(targets: LoraTargets) -> str:
    digest = hashlib.sha256()
    for name in ("metadata.json", "index.json", "dataset_info.json"):
        digest.update((targets.path / name).read_bytes())
    for shard in sorted(targets.path.glob("*.array_record-*")):
        status = shard.stat()
        digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _write_cache(path: Path, shape: tuple[int, int], targets: LoraTargets, kind, reference) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        vectors = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write the cache of vectors ({error})") from None
    try:
        _fill(vectors, targets, kind, reference)
        vectors.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
