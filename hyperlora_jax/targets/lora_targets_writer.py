"""Builds a LoRA-target dataset from finished subjects, in one pass and in bounded memory.

The result is an ordinary TFDS dataset of uncompressed ArrayRecord shards (trained factors are
noise to a compressor: 7 % smaller, four times slower to read). It is built in a sibling folder
and renamed, so a dataset exists whole or not at all.

Every dataset carries a README.md.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.pictures.subjects import Subject, split_by_hash
from hyperlora_jax.targets import lora_target_records
from hyperlora_jax.targets.vector_statistics import (
    RunningWhitening,
    VectorWhitening,
    factor_slices,
)

_CARD = """# LoRA targets

{total} subjects ({splits}). {loras}

| | |
|---|---|
| format | {format} (TFDS, ArrayRecord, uncompressed) |
| spec fingerprint | `{fingerprint}` |
| base model hash | `{base_hash}` |
| numbers per LoRA | {num_parameters:,} in {num_sites} layers, stored as {lora_dtype} |
| encoders | {encoders} |

Splits are by identity: no identity is in two of them.

## Reading it
```python
import tensorflow_datasets as tfds

source = tfds.builder_from_directory("THIS FOLDER").as_data_source(split="{first}")
example = source[0]{decode}
picture = PIL.Image.open(io.BytesIO(example["references"][0]))  # where there is one
```
or, with hyperlora_jax: `from hyperlora_jax.targets.lora_targets import open_lora_targets`.

| field | content |
|---|---|
| `lora` | folded factors (delta = down · up, no alpha) as one vector: sites in spec order, lora_A \
(r, in) row by row, then lora_B (out, r) |
| `references`, `targets` | bytes of PNG files; every target has a caption |
| `embeddings/ENCODER` | one row per reference |
| `identity`, `seed`, `num_steps`, `loss_curve` | who is shown, and how the LoRA was fitted |

`metadata.json` holds the spec and the facts below, `index.json` the ids by split,
`whitening.safetensors` the element-wise mean and one standard deviation per factor matrix of the
training split.

## How it was made
```json
{facts}
```
"""


def text(metadata: Mapping) -> str:
    """The card of a dataset, from its metadata."""
    counts = metadata["num_subjects"]
    sites = json.loads(metadata["spec"])["sites"]
    # A site's row: path, in, out, rank, kind, kernel height and width, strides.
    numbers = sum(rank * (i * kh * kw + o) for _, i, o, rank, _, kh, kw, *_ in sites)
    bits = "\n# bfloat16 bits: (example['lora'].astype('uint32') << 16).view('float32')"
    return _CARD.format(
        total=sum(counts.values()),
        splits=", ".join(f"{split} {count}" for split, count in counts.items()),
        loras="Every subject has a LoRA." if sites else "Pictures only, no LoRAs.",
        format=metadata["format"],
        fingerprint=metadata["fingerprint"],
        base_hash=metadata["base_hash"] or "not recorded",
        num_parameters=numbers,
        num_sites=len(sites),
        lora_dtype=metadata["lora_dtype"],
        encoders=", ".join(f"{k} ({v})" for k, v in metadata["embedding_sizes"].items()) or "none",
        first=next(iter(counts)),
        decode=bits if metadata["lora_dtype"] == "bfloat16" else "",
        facts=json.dumps(metadata["facts"], indent=2, sort_keys=True),
    )


NAME = "lora_targets"
FORMAT = "hyperlora-lora-targets/1"
SHARD_BYTES = 256 * 2**20
STATISTICS_BATCH = 32  # vectors added to the statistics at a time


def write_lora_targets(
    path: str | Path,
    subjects: Iterable[Subject],
    spec: LoraSpec,
    base_hash: str,
    facts: Mapping | None = None,
    lora_dtype: str = "float32",
    overwrite: bool = False,
    extra_files: Mapping[str, Callable[[], str]] | None = None,
) -> Path:
    """Writes subjects (a list, a generator) as a dataset folder at `path`.

    Args:
        path: the folder that `tfds.builder_from_directory` will open.
        subjects: with a LoRA each, or (an empty spec) without; where they name no split, it is
            that of `split_by_hash`.
        spec: what the vectors mean; its fingerprint and `base_hash` guard every reader.
        base_hash: of the base model that the LoRAs were fitted on.
        facts: JSON-able: recipe, initialisation seed, avatar style, command, licence, ...; read
            at the end, so a generator of subjects may fill it.
        lora_dtype: "float32" or "bfloat16".
        overwrite: replace a dataset that is there.
        extra_files: further text files by name, their content asked for at the end.

    Raises UserError for an existing or unwritable path, no subjects, or LoRAs of another size.
    """
    path = Path(path)
    if lora_dtype not in lora_target_records.LORA_DTYPES:
        raise UserError(f"lora_dtype is {lora_dtype!r}, expected float32 or bfloat16")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a new dataset folder")
    if path.exists() and not overwrite and any(path.iterdir()):
        raise UserError(f"{path}: exists and is not empty; expected a new dataset folder")
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        writer = _Writer(partial, spec, lora_dtype)
        for subject in subjects:
            writer.add(subject)
        writer.finish(base_hash, dict(facts or {}))
        for name, content in (extra_files or {}).items():
            (partial / name).write_text(content(), encoding="utf-8")
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path}: cannot write the dataset ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


class _Writer:
    def __init__(self, folder: Path, spec: LoraSpec, lora_dtype: str):
        self.folder, self.spec, self.lora_dtype = folder, spec, lora_dtype
        self.shards: dict[str, _Shards] = {}
        self.index: dict[str, list[list[str]]] = {}
        self.statistics = RunningWhitening(spec) if len(spec) else None
        self.pending: list[np.ndarray] = []
        self.embedding_sizes: dict[str, int] | None = None
        self.ids: set[str] = set()
        self.owner: dict[str, str] = {}

    def add(self, subject: Subject) -> None:
        self._check(subject)
        split = subject.split or split_by_hash(subject.identity)
        if self.owner.setdefault(subject.identity, split) != split:
            raise UserError(
                f"identity {subject.identity!r} is in split {split} and in "
                f"{self.owner[subject.identity]}; an identity must be in one split"
            )
        if split not in self.shards:
            self.shards[split] = _Shards(self.folder, split)
            self.index[split] = []
        self.shards[split].write(lora_target_records.serialize(subject, self.lora_dtype))
        self.index[split].append([subject.id, subject.identity])
        if subject.lora is not None and split == "train":
            self.pending.append(subject.lora)
            if len(self.pending) == STATISTICS_BATCH:
                self._flush()

    def _flush(self) -> None:
        if self.pending and self.statistics:
            self.statistics.add(np.stack(self.pending))
        self.pending = []

    def _check(self, subject: Subject) -> None:
        if subject.id in self.ids:
            raise UserError(f"subject {subject.id!r} is given twice")
        self.ids.add(subject.id)
        size = 0 if subject.lora is None else subject.lora.size
        if size != self.spec.num_parameters:
            raise UserError(
                f"subject {subject.id!r}: its LoRA has {size} numbers, "
                f"the spec {self.spec.fingerprint[:12]} has {self.spec.num_parameters}"
            )
        sizes = {encoder: rows.shape[-1] for encoder, rows in subject.embeddings.items()}
        if self.embedding_sizes is None:
            self.embedding_sizes = sizes
        if sizes != self.embedding_sizes:
            raise UserError(
                f"subject {subject.id!r}: its embeddings are {sizes}, "
                f"those of the subjects before are {self.embedding_sizes}"
            )

    def finish(self, base_hash: str, facts: dict) -> None:
        if not self.ids:
            raise UserError("no subjects to write: expected at least one finished LoRA")
        self._flush()
        metadata = {
            "format": FORMAT,
            "spec": self.spec.to_json(),
            "fingerprint": self.spec.fingerprint,
            "base_hash": base_hash,
            "lora_dtype": self.lora_dtype,
            "embedding_sizes": self.embedding_sizes,
            "num_subjects": {split: len(rows) for split, rows in self.index.items()},
            "facts": facts,
        }
        if self.statistics and self.statistics.count:
            metadata["std_per_factor"] = self._write_statistics(self.statistics.result())
        splits = [shards.close() for shards in self.shards.values()]
        (self.folder / "index.json").write_text(json.dumps(self.index), encoding="utf-8")
        self._write_tfds(metadata, splits)
        (self.folder / "README.md").write_text(text(metadata), encoding="utf-8")

    def _write_statistics(self, result: VectorWhitening) -> dict[str, float]:
        tensors = {"raw.mean": result.mean, "raw.std": result.std}
        safetensors_io.write(self.folder / "whitening.safetensors", tensors, {})
        slices = factor_slices(self.spec)
        return {f"{s.path}.{s.side}": float(v) for s, v in zip(slices, result.std, strict=True)}

    def _write_tfds(self, metadata: dict, splits: list[tuple[str, list[int], int]]) -> None:
        import tensorflow_datasets as tfds

        infos = [
            tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=num_bytes)
            for name, lengths, num_bytes in splits
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=os.fspath(self.folder),
            features=lora_target_records.features(
                self.spec.num_parameters, self.lora_dtype, self.embedding_sizes or {}
            ),
            split_infos=infos,
            version="1.0.0",
            check_data=False,
            description="LoRA weights with the pictures and embeddings that they belong to.",
            metadata=tfds.core.MetadataDict(metadata),
            disable_shuffling=True,
        )


class _Shards:
    """ArrayRecord files of one split; they get their final names when their number is known."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.lengths: list[int] = []
        self.num_bytes = 0
        self.room = 0
        self.file = None

    def write(self, record: bytes) -> None:
        from array_record.python import (
            array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
        )

        if self.file is None or self.room < len(record):
            self._close_file()
            path = self.folder / f"{self.split}-{len(self.lengths):05d}"
            self.file = array_record_module.ArrayRecordWriter(
                os.fspath(path), "group_size:1,uncompressed"
            )
            self.lengths.append(0)
            self.room = SHARD_BYTES
        self.file.write(record)
        self.room -= len(record)
        self.num_bytes += len(record)
        self.lengths[-1] += 1

    def _close_file(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def close(self) -> tuple[str, list[int], int]:
        self._close_file()
        total = len(self.lengths)
        for k in range(total):
            name = f"{NAME}-{self.split}.array_record-{k:05d}-of-{total:05d}"
            (self.folder / f"{self.split}-{k:05d}").rename(self.folder / name)
        return self.split, self.lengths, self.num_bytes
