"""What the hypernetwork is trained on: encoded pictures, and LoRA vectors of a dataset."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax.array_types import Float, Int
from hyperlora_jax.data.encoded_subjects import EncodedSubjects, encode_once
from hyperlora_jax.data.gauged_targets import read_in_gauge
from hyperlora_jax.data.lora_targets import open_lora_targets
from hyperlora_jax.data.subject_pictures import load_pictures
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.stable_diffusion.embedded import image_size

CHECKED = 256  # vectors per look for numbers that are not finite


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """LoRA vectors by number of their subject, read when asked for (they may be memory-mapped)."""

    vectors: Float[np.ndarray, "n d"]
    row_of: Int[np.ndarray, " s"]  # -1 = the subject has none: zeros

    def __len__(self) -> int:
        return len(self.row_of)

    def __getitem__(self, subjects: Any) -> Float[np.ndarray, "b d"]:
        rows = self.row_of[subjects]
        return np.where((rows >= 0)[:, None], np.asarray(self.vectors[np.maximum(rows, 0)]), 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingTargets:
    """LoRAs of training subjects.

    Attributes:
        rows: vectors by subject number.
        subjects: the subjects that have one, ascending.
        mean, std: statistics, see `vector_statistics.VectorWhitening`.
        facts: dataset, gauge and number, for the checkpoint.
    """

    rows: Rows
    subjects: Int[np.ndarray, " n"]
    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " m"]
    facts: dict[str, Any]


def read_encoded(
    config: Any, workdir: Path, sd: Any, encoder: Any
) -> tuple[EncodedSubjects, dict[str, Any]]:
    """Encoded training subjects, from the workdir if the same were encoded before; and their
    pictures' facts."""
    pictures = load_pictures(
        config.data, config.data.num_identities, image_size(sd), workdir / "renders"
    )
    encoded = encode_once(
        workdir,
        sd,
        encoder,
        pictures.ids,
        pictures.images,
        pictures.captions,
        batch_size=config.train.encode_batch_size,
    )
    return encoded, dict(pictures.facts)


def read_targets(
    config: Any, workdir: Path, spec: LoraSpec, base_hash: str, encoded: EncodedSubjects
) -> TrainingTargets:
    """LoRA vectors of the training subjects in the gauge `data.gauge`, at most `data.num_targets`.

    Raises:
        UserError: a dataset of another base or spec, of none of the subjects, or with numbers that
            are not finite.
    """
    dataset = open_lora_targets(config.data.targets or workdir / "targets", spec, base_hash)
    gauged = read_in_gauge(dataset, config.data.gauge, workdir / "cache")
    number = {name: k for k, name in enumerate(encoded.ids)}
    rows = [int(i) for i in dataset.split_indices("train") if dataset.ids[int(i)] in number]
    if not rows:
        raise UserError(
            f"{dataset.path}: none of its {len(dataset)} subjects is among the "
            f"{len(encoded.ids)} training identities; were both made with the same data section?"
        )
    if config.data.num_targets:
        if config.data.num_targets > len(rows):
            raise UserError(
                f"data.num_targets: got {config.data.num_targets}, but {dataset.path} has "
                f"{len(rows)} LoRAs of training identities"
            )
        rows = rows[: config.data.num_targets]
    for start in range(0, len(rows), CHECKED):
        chunk = np.asarray(rows[start : start + CHECKED])
        finite = np.isfinite(gauged.vectors[chunk]).all(axis=1)
        if not finite.all():
            bad = dataset.ids[int(chunk[~finite][0])]
            raise UserError(
                f"{dataset.path}: the LoRA of subject {bad} holds numbers that are not finite; "
                "expected finite targets"
            )
    row_of = np.full(len(encoded.ids), -1, np.int64)
    row_of[[number[dataset.ids[i]] for i in rows]] = rows
    facts = {**gauged.facts(), "targets": len(rows), "dataset": dataset.facts.get("recipe", {})}
    return TrainingTargets(
        Rows(gauged.vectors, row_of),
        np.flatnonzero(row_of >= 0),
        np.asarray(gauged.whitening.mean, np.float32),
        np.asarray(gauged.whitening.std, np.float32),
        facts,
    )
