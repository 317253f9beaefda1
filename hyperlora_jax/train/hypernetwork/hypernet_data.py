"""What the hypernetwork is trained on: encoded pictures, and LoRA vectors of a dataset."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.array_types import DType, Float, Index, Int, Json
from hyperlora_jax.batches.mixing import MixedSubjects
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.parallel import multihost
from hyperlora_jax.stable_diffusion.embedded import image_size
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.subjects.concept_sources import split_paths
from hyperlora_jax.subjects.encoded_subjects import EncodedSubjects
from hyperlora_jax.subjects.encoding_cache import encode_once
from hyperlora_jax.subjects.subject_pictures import load_pictures
from hyperlora_jax.targets.gauged_targets import GaugedVectors, read_in_gauge
from hyperlora_jax.targets.lora_targets import LoraTargets, open_lora_targets
from hyperlora_jax.targets.mapped_vectors import MappedVectors
from hyperlora_jax.targets.vector_statistics import pooled
from hyperlora_jax.train.loop import arithmetic_dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """LoRA vectors by number of their subject, read when asked for (they may be memory-mapped).

    Attributes:
        vectors: of every dataset.
        dataset_of: which dataset a subject's LoRA is in.
        row_of: its row there; -1 = the subject has none: zeros.
    """

    vectors: tuple[Float[np.ndarray, "_ d"] | MappedVectors, ...]
    dataset_of: Int[np.ndarray, " s"]
    row_of: Int[np.ndarray, " s"]

    def __len__(self) -> int:
        return len(self.row_of)

    def of(self, subjects: Int[np.ndarray, " n"]) -> "Rows":
        """Those of some subjects, numbered anew in this order; nothing is read."""
        return Rows(self.vectors, self.dataset_of[subjects], self.row_of[subjects])

    def __array__(self, dtype: DType | None = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self[:], dtype)

    def __getitem__(self, subjects: Index) -> Float[np.ndarray, "b d"]:
        rows, datasets = self.row_of[subjects], self.dataset_of[subjects]
        if len(self.vectors) == 1 and (rows >= 0).all():
            return self.vectors[0][rows]
        batch = np.zeros((len(rows), self.vectors[0].shape[1]), np.float32)
        for k, vectors in enumerate(self.vectors):
            mine = (rows >= 0) & (datasets == k)
            batch[mine] = vectors[rows[mine]]
        return batch


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingTargets:
    """LoRAs of training subjects.

    Attributes:
        rows: vectors by subject number.
        subjects: the subjects that have one, ascending.
        mean, std: statistics, see `vector_statistics.VectorWhitening`.
        facts: dataset, gauge and number, for the checkpoint.
        weights: how often every dataset's subjects are drawn; () = all subjects equally often.
    """

    rows: Rows
    subjects: Int[np.ndarray, " n"]
    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " m"]
    facts: Json
    weights: tuple[float, ...] = ()

    def order(self, seed: int) -> MixedSubjects | None:
        """The order by `weights`, None without."""
        if not self.weights:
            return None
        datasets = self.rows.dataset_of[self.subjects]
        groups = [self.subjects[datasets == k] for k in range(len(self.weights))]
        return MixedSubjects(groups, self.weights, seed)


def read_encoded(
    config: ConfigDict,
    workdir: epath.PathLike,
    scratch: Path,
    sd: StableDiffusion,
    encoder: ImageEncoder,
    *,
    latents: bool,
    texts: bool,
) -> tuple[EncodedSubjects, Json]:
    """Encoded training subjects, from the workdir if the same were encoded before; and their
    pictures' facts.

    They are kept in bfloat16 where the frozen models compute in it (`train.dtype`): what it cannot
    tell apart they cannot either.

    Args:
        latents, texts: whether a loss reads those of the targets.

    Raises:
        UserError: the workdir's checkpoints were trained on other pictures; which ones is said.
    """
    count, size = config.data.num_identities, image_size(sd)
    pictures = multihost.first_then_others(
        "pictures", lambda: load_pictures(config.data, count, size, scratch / "renders")
    )
    if pictures.marks:
        same_as_before(workdir, pictures.ids, pictures.marks, pictures.images.counts)
    encoded = encode_once(
        workdir,
        sd,
        pictures,
        encoder=encoder,
        latents=latents,
        texts=texts,
        dtype=arithmetic_dtype(config.train),
        batch_size=config.train.encode_batch_size,
    )
    return encoded, dict(pictures.facts)


def same_as_before(
    workdir: epath.PathLike, ids: Sequence[str], marks: Sequence[str], counts: Sequence[int]
) -> None:
    """Keeps the marks and numbers of all subjects' pictures in WORKDIR/pictures.json.

    Raises:
        UserError: WORKDIR has checkpoints, and some subjects have other pictures now.
    """
    now = {name: [mark, count] for name, mark, count in zip(ids, marks, counts, strict=True)}
    file, trained = (epath.Path(workdir) / name for name in ("pictures.json", "checkpoints"))
    if not (trained.exists() and any(step.name.isdigit() for step in trained.iterdir())):
        if multihost.is_first():
            storage.replaced(file, json.dumps(now).encode())
        return
    before = json.loads(file.read_text()) if file.exists() else now
    if other := {name: row for name, row in now.items() if before.get(name, row) != row}:
        name, (_, count) = next(iter(other.items()))
        was = before[name][1]
        how = f"{was} pictures, now {count}" if was != count else "other contents or captions"
        raise UserError(
            f"{workdir}: {len(other)} of its {len(before)} subjects have other pictures than those "
            f"that it was trained on, first {name!r} ({how}); use another workdir"
        )
    new, gone = sorted(now.keys() - before.keys()), sorted(before.keys() - now.keys())
    if new or gone:
        names = [f"{len(own)} {what} (first {own[0]!r})"
                 for own, what in ((new, "new"), (gone, "gone")) if own]  # fmt: skip
        raise UserError(
            f"{workdir}: has other subjects now than the {len(before)} that it was trained on: "
            f"{' and '.join(names)}; use another workdir"
        )


def read_targets(
    config: ConfigDict,
    own: epath.PathLike,
    scratch: Path,
    spec: LoraSpec,
    base_hash: str,
    encoded: EncodedSubjects,
) -> TrainingTargets:
    """LoRA vectors of the training subjects in the gauge `data.gauge`, at most `data.num_targets`
    of each of the datasets `data.targets` (none given: the dataset `own`); what is made of them is
    kept beside them, in `scratch` where a dataset's folder cannot be written.

    Raises:
        UserError: a dataset of another base or spec, of none of the subjects, or with numbers that
            are not finite; weights for another number of datasets, several datasets in a gauge
            that depends on them, a subject in two of them.
    """
    data = config.data
    paths = split_paths(data.targets) if data.targets else [str(own)]
    weights = tuple(float(weight) for weight in data.target_weights)
    if weights and len(weights) != len(paths):
        raise UserError(f"data.target_weights: got {weights} for {len(paths)} datasets")
    if len(paths) > 1 and data.gauge != "raw":
        raise UserError(
            f"data.gauge: got {data.gauge!r} for {len(paths)} datasets, expected 'raw': the others "
            "are turned by each dataset's own mean"
        )
    number = {name: k for k, name in enumerate(encoded.ids)}
    dataset_of = np.zeros(len(encoded.ids), np.int64)
    row_of = np.full(len(encoded.ids), -1, np.int64)
    sources: list[GaugedVectors] = []
    facts: list[Json] = []
    for path in paths:
        dataset, gauged = multihost.first_then_others(
            f"targets/{len(sources)}",
            functools.partial(_read_dataset, path, spec, base_hash, data, scratch / "cache"),
        )
        rows = _rows_of(dataset, gauged, number, data.num_targets)
        subjects = np.asarray([number[dataset.ids[i]] for i in rows])
        if (row_of[subjects] >= 0).any():
            twice = encoded.ids[int(subjects[row_of[subjects] >= 0][0])]
            raise UserError(f"{path}: subject {twice} is in another dataset of data.targets too")
        dataset_of[subjects], row_of[subjects] = len(sources), rows
        sources.append(gauged)
        recipe = dataset.facts.get("recipe", {})
        facts.append({**gauged.facts(), "targets": len(rows), "dataset": recipe})
    shares = weights or [fact["targets"] for fact in facts]
    whitening = pooled([gauged.whitening for gauged in sources], shares, spec)
    alone = len(facts) == 1
    return TrainingTargets(
        Rows(tuple(gauged.vectors for gauged in sources), dataset_of, row_of),
        np.flatnonzero(row_of >= 0),
        np.asarray(whitening.mean, np.float32),
        np.asarray(whitening.std, np.float32),
        facts[0] if alone else {"datasets": facts, "weights": weights},
        () if alone else weights,
    )


def _read_dataset(
    path: str, spec: LoraSpec, base_hash: str, data: ConfigDict, cache: Path
) -> tuple[LoraTargets, GaugedVectors]:
    dataset = open_lora_targets(path, spec, base_hash, data.skip_damaged)
    return dataset, read_in_gauge(dataset, data.gauge, cache)


def _rows_of(
    dataset: LoraTargets, gauged: GaugedVectors, number: Mapping[str, int], most: int
) -> list[int]:
    """Rows of a dataset's training subjects, checked; the first `most` of them (0 = all)."""
    rows = [int(i) for i in dataset.split_indices("train") if dataset.ids[int(i)] in number]
    if not rows:
        raise UserError(
            f"{dataset.path}: none of its {len(dataset)} subjects is among the "
            f"{len(number)} training identities; were both made with the same data section?"
        )
    if most:
        if most > len(rows):
            raise UserError(
                f"data.num_targets: got {most}, but {dataset.path} has "
                f"{len(rows)} LoRAs of training identities"
            )
        rows = rows[:most]
    bad = np.intersect1d(rows, gauged.not_finite)
    if len(bad):
        raise UserError(
            f"{dataset.path}: the LoRA of subject {dataset.ids[int(bad[0])]} holds numbers that "
            "are not finite; expected finite targets"
        )
    return rows
