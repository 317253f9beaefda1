"""What one pass over all LoRA vectors of a dataset finds, kept so that no run makes it again.

DATASET/cache/summary-GAUGE-DIGEST.npz   see `beside_dataset`
"""

import dataclasses
import hashlib
import logging
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import Float, Int
from hyperlora_jax.data import beside_dataset
from hyperlora_jax.data.lora_targets import LoraTargets
from hyperlora_jax.data.vector_statistics import RunningWhitening, factor_slices

log = logging.getLogger(__name__)
CHUNK = 16  # vectors at a time; another number gives other last digits of the statistics


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
            for rows in (part[start : start + CHUNK] for start in range(0, len(part), CHUNK)):
                vectors = read(slice(rows.start, rows.stop))
                finite = np.isfinite(vectors).all(axis=1)
                not_finite += [row for row, good in zip(rows, finite, strict=True) if not good]
                if counted:
                    running.add(vectors)
                bar.update(len(rows))
    found = running.result()
    return found.mean, found.std, np.asarray(not_finite, np.int64)


def training_rows(targets: LoraTargets) -> Int[np.ndarray, " n"]:
    """Rows that statistics are made of: the training split, or all where there is none."""
    return targets.split_indices("train") if "train" in targets.splits else np.arange(len(targets))


def name_of(targets: LoraTargets, kind: str) -> str:
    """GAUGE-DIGEST: another one for every state of the dataset, and for what of it was read."""
    found = beside_dataset.digest(targets.path)
    if len(targets) != sum(targets.metadata["num_subjects"].values()):
        found = hashlib.sha256("\n".join([found, *targets.ids]).encode()).hexdigest()[: len(found)]
    return f"{kind}-{found}"


def find(places: Sequence[Path], name: str, targets: LoraTargets) -> Summary | None:
    """The kept summary, None without a whole one of this dataset's size."""
    for path in (place / f"summary-{name}.npz" for place in places):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {key: arrays[key] for key in arrays.files}
            texts = {"mark": str(found["mark"]), "files": tuple(map(str, found["files"]))}
            summary = Summary(**{**found, **texts})
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
