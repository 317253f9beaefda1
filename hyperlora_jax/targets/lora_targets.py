"""Opens a LoRA-target dataset: random access to subjects, their vectors, spec and statistics."""

import collections
import contextlib
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from etils import epath
from tqdm import tqdm

from hyperlora_jax import storage
from hyperlora_jax.array_types import Float, Int
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.pictures.subjects import SPLITS, Subject
from hyperlora_jax.targets import beside_dataset
from hyperlora_jax.targets import lora_target_records as record_format
from hyperlora_jax.targets.lora_targets_writer import FORMAT
from hyperlora_jax.targets.vector_statistics import RunningWhitening, VectorWhitening

log = logging.getLogger(__name__)
T = TypeVar("T")


def open_lora_targets(
    path: epath.PathLike,
    spec: LoraSpec | None = None,
    base_hash: str | None = None,
    skip_damaged: bool = False,
) -> "LoraTargets":
    """The dataset of a folder, which is copied here first where it lies in a bucket.

    With `spec` or `base_hash` it must be of the same layers and base model. Raises UserError
    naming the folder and both sides when it is not, or when it is no such dataset.

    Args:
        skip_damaged: read all of it, once for all runs, and leave out what cannot be read, with a
            warning that names the files; otherwise the first such subject that is asked for is an
            error.
    """
    targets = LoraTargets(storage.fetched(path), skip_damaged)
    if spec is not None and spec.fingerprint != targets.spec.fingerprint:
        raise UserError(
            f"{path}: its LoRAs have the layers {_describe(targets.spec)}, "
            f"expected {_describe(spec)}"
        )
    if base_hash is not None and base_hash != targets.base_hash:
        raise UserError(
            f"{path}: its LoRAs were fitted on base {targets.base_hash[:12] or 'unknown'}, "
            f"expected base {base_hash[:12]}"
        )
    return targets


class LoraTargets:
    """A dataset on disk. Subjects are numbered through: train first, then validation, test."""

    def __init__(self, path: Path, skip_damaged: bool = False):
        self.path = path
        try:
            self.metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
            index = json.loads((path / "index.json").read_text(encoding="utf-8"))
            file_format = self.metadata["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: is no LoRA-target dataset, expected a folder written by "
                "`hyperlora distill` or `hyperlora import`"
            ) from None
        if file_format != FORMAT:
            raise UserError(f"{path}: is of format {file_format!r}, expected {FORMAT!r}")
        self.spec = LoraSpec.from_json(self.metadata["spec"])
        self.base_hash: str = self.metadata["base_hash"]
        self.facts: dict = self.metadata["facts"]
        self.lora_dtype: str = self.metadata["lora_dtype"]
        self.embedding_sizes: dict[str, int] = self.metadata["embedding_sizes"]
        self.splits = [split for split in SPLITS if split in index]
        self._skip_damaged, self._sources = skip_damaged, dict[str, Any]()
        self._hold(index, {split: list(range(len(index[split]))) for split in self.splits})
        if skip_damaged:
            self._hold(index, self._readable())

    def _hold(self, index: dict[str, list], records: dict[str, list[int]]) -> None:
        """Makes these records of every split the dataset."""
        self._records = records
        rows = {split: [index[split][k] for k in records[split]] for split in self.splits}
        self.split_ids = {split: [row[0] for row in rows[split]] for split in self.splits}
        self.ids = [row[0] for split in self.splits for row in rows[split]]
        self.identities = [row[1] for split in self.splits for row in rows[split]]
        self._ends = np.cumsum([len(rows[split]) for split in self.splits])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Subject:
        sizes = self.embedding_sizes
        return self.read(
            i, lambda record, split: record_format.parse(record, self.lora_dtype, sizes, split)
        )

    def split_indices(self, split: str) -> Int[np.ndarray, " n"]:
        """Numbers of the subjects of a split; empty when the dataset has none."""
        if split not in self.splits:
            return np.zeros(0, np.int64)
        k = self.splits.index(split)
        return np.arange(self._ends[k] - len(self.split_ids[split]), self._ends[k])

    def loras(
        self, indices: Sequence[int] | np.ndarray, dtype: str = "float32"
    ) -> Float[np.ndarray, "n d"]:
        """The vectors of some subjects, as float32 or bfloat16."""
        if not len(self.spec):
            raise UserError(f"{self.path}: holds pictures only, expected a dataset with LoRAs")
        parsers = {
            "float32": record_format.parse_vector,
            "bfloat16": record_format.parse_bfloat16,
        }
        if dtype not in parsers:
            raise UserError(f"dtype of LoRAs is {dtype!r}, expected float32 or bfloat16")
        out = np.empty((len(indices), self.spec.num_parameters), dtype)
        parse = parsers[dtype]
        for row, i in enumerate(indices):
            out[row] = self.read(int(i), lambda record, _: parse(record, self.lora_dtype))
        return out

    def matrix(self, split: str | None = None) -> Float[np.ndarray, "n d"]:
        """All vectors, or those of one split, in the order of `ids`; n * d * 4 bytes."""
        return self.loras(np.arange(len(self)) if split is None else self.split_indices(split))

    def whitening(self) -> VectorWhitening:
        """Statistics of the raw training vectors; from the file when it is there."""
        from safetensors.numpy import load_file

        path = self.path / "whitening.safetensors"
        if path.exists():
            tensors = load_file(path)
            return VectorWhitening(tensors["raw.mean"], tensors["raw.std"])
        running = RunningWhitening(self.spec)
        chosen = self.split_indices("train") if "train" in self.splits else np.arange(len(self))
        for start in range(0, len(chosen), 32):
            running.add(self.loras(chosen[start : start + 32]))
        return running.result()

    def _readable(self) -> dict[str, list[int]]:
        """The records of every split that can be read; found out once for these files."""
        places = beside_dataset.folders(self.path)
        name = f"readable-{beside_dataset.digest(self.path)}.json"
        try:
            record = json.loads((places[0] / name).read_text(encoding="utf-8"))
            good, lost = record["records"], record["lost"]
        except (OSError, ValueError, KeyError, TypeError):
            good, lost = self._read_all()
            text = json.dumps({"records": good, "lost": lost})
            with contextlib.suppress(OSError):  # the next run reads them again
                beside_dataset.written(places, name, lambda file: file.write(text.encode()))
        if lost:
            files = ", ".join(f"{number} in {shard}" for shard, number in sorted(lost.items()))
            log.warning("%s: leaves out subjects that cannot be read: %s", self.path, files)
        if not any(good.values()):
            raise UserError(f"{self.path}: none of its {len(self)} subjects can be read")
        return good

    def _read_all(self) -> tuple[dict[str, list[int]], dict[str, int]]:
        """(records of every split that can be read, how many of each file cannot)."""
        good: dict[str, list[int]] = {split: [] for split in self.splits}
        lost: collections.Counter[str] = collections.Counter()
        for i in tqdm(range(len(self)), desc=f"checking {self.path.name}", unit="subject"):
            split, record = self._place(i)
            try:
                self[i]
            except UserError:
                lost[self._shard(split, record)] += 1
            else:
                good[split].append(record)
        return good, dict(lost)

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds
        from google.protobuf.json_format import ParseError

        try:
            return tfds.builder_from_directory(str(self.path))
        except (OSError, ValueError, KeyError, AttributeError, ParseError) as error:
            raise UserError(f"{self.path}: the dataset cannot be read ({error})") from None

    @functools.cached_property
    def _shards(self) -> dict[str, tuple[list[str], Int[np.ndarray, " s"]]]:
        """Of every split: (its files, number of records up to the end of each)."""
        infos = {split: self._builder.info.splits[split] for split in self.splits}
        return {
            split: (sorted(info.filenames), np.cumsum(info.shard_lengths))
            for split, info in infos.items()
        }

    @functools.cached_property
    def _missing(self) -> set[str]:
        shards = [shard for files, _ in self._shards.values() for shard in files]
        missing = [shard for shard in shards if not (self.path / shard).exists()]
        if missing and not self._skip_damaged:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(shards)} files are missing, first "
                f"{missing[0]}"
            )
        return set(missing)

    def _shard(self, split: str, record: int) -> str:
        files, ends = self._shards[split]
        return files[int(np.searchsorted(ends, record, side="right"))]

    def files(self) -> tuple[list[Path], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The ArrayRecord files, and of every subject: (which of them, its number there)."""
        files, file_of, numbers = list[Path](), [], []
        for split in self.splits:
            names, ends = self._shards[split]
            records = np.asarray(self._records[split], np.int64)
            own = np.searchsorted(ends, records, side="right")
            file_of.append(own + len(files))
            numbers.append(records - np.concatenate([[0], ends])[own])
            files += [self.path / name for name in names]
        return files, np.concatenate(file_of), np.concatenate(numbers)

    def _source(self, split: str) -> Any:
        if split not in self._sources:
            try:
                source = self._builder.as_data_source(split=split)
                self._sources[split] = source.data_source
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{self.path}: the dataset cannot be read ({error})") from None
        return self._sources[split]

    def _place(self, i: int) -> tuple[str, int]:
        """(split, record in it) of the i-th subject."""
        k = int(np.searchsorted(self._ends, i, side="right"))
        split = self.splits[k]
        return split, self._records[split][i - int(self._ends[k]) + len(self._records[split])]

    def read(self, i: int, parse: Callable[[bytes, str], T]) -> T:
        """parse(record, split) of the i-th subject; UserError where its record is damaged."""
        from google.protobuf.message import DecodeError

        if not -len(self) <= i < len(self):
            raise IndexError(f"subject {i} of {len(self)}")
        split, record = self._place(i % len(self))
        shard = self._shard(split, record)
        if shard in self._missing:
            raise UserError(f"{self.path}: its file {shard} is missing")
        try:
            return parse(self._source(split)[record], split)
        except (KeyError, IndexError, ValueError, RuntimeError, DecodeError) as error:
            # ArrayRecord reports a damaged file in its log and answers with an empty record.
            raise UserError(
                f"{self.path}: subject {i} cannot be read, {shard} is damaged ({error})"
            ) from None


def _describe(spec: LoraSpec) -> str:
    return (
        f"{spec.fingerprint[:12]} ({len(spec)} sites, rank {spec.max_rank}, "
        f"{spec.num_parameters} numbers)"
    )
