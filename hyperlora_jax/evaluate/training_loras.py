"""The LoRAs that closed forms learn from and the memorisation audit looks at: the datasets of a
config's `data.targets`. An end-to-end run needs none, and an imported one holds no pictures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax.array_types import Float, Int, Json
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.sample_cache import pooled_embeddings
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.parallel import multihost
from hyperlora_jax.pictures import pictures
from hyperlora_jax.subjects.concept_sources import split_paths
from hyperlora_jax.targets.gauged_targets import read_in_gauge
from hyperlora_jax.targets.lora_targets import LoraTargets, open_lora_targets

READ_AT_ONCE = 256  # subjects whose references are in memory


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingLoras:
    """Datasets of LoRAs, in the order of the config.

    Attributes:
        datasets: none for a run without.
        rows: of every dataset, its training subjects.
        no_loras: why there are no LoRAs; "" where there are.
        no_pictures: why there are no reference pictures of their subjects; "" where there are.
    """

    datasets: tuple[LoraTargets, ...]
    rows: tuple[Int[np.ndarray, " _"], ...]
    no_loras: str
    no_pictures: str

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    @property
    def ids(self) -> frozenset[str]:
        """Everybody in the datasets, of whatever split."""
        return frozenset(name for dataset in self.datasets for name in dataset.ids)

    def facts(self) -> list[Json]:
        """Of every dataset: where it is, how many of its LoRAs are used, what made it."""
        return [
            {"path": str(dataset.path), "num_loras": len(rows), **dataset.facts}
            for dataset, rows in zip(self.datasets, self.rows, strict=True)
        ]

    def vectors(self, gauge: str, cache: Path) -> Float[np.ndarray, "t d"]:
        """The LoRAs in a gauge, turned ones kept in the folder `cache`."""
        parts = []
        for dataset, rows in zip(self.datasets, self.rows, strict=True):
            gauged = multihost.first_then_others(
                "gauge", lambda dataset=dataset: read_in_gauge(dataset, gauge, cache)
            )
            parts.append(np.asarray(gauged.vectors[rows]))
        return np.concatenate(parts)

    def embeddings(
        self, encoder: ImageEncoder, folder: epath.PathLike | None = None
    ) -> Float[np.ndarray, "t e"]:
        """Mean pooled embedding of the reference pictures of every subject.

        Args:
            folder: see `pooled_embeddings`.
        """
        pairs = zip(self.datasets, self.rows, strict=True)
        return np.concatenate([_embeddings(encoder, *pair, folder) for pair in pairs])


def open_training_loras(
    data: ConfigDict, own: epath.PathLike, spec: LoraSpec, base_hash: str
) -> TrainingLoras:
    """The datasets of a config's `data` section; without `data.targets` the folder `own`, as far
    as it is there and fits.

    Raises:
        UserError: a dataset of `data.targets` that is none, or of another base or layers.
    """
    datasets: list[LoraTargets] = []
    for path in split_paths(data.targets) if data.targets else [own]:
        try:
            datasets.append(open_lora_targets(path, spec, base_hash, data.skip_damaged))
        except UserError as error:
            if data.targets:
                raise
            why = str(error)
            if not (epath.Path(own) / "metadata.json").exists():
                why = f"{own}: no LoRA dataset, `hyperlora distill` would make one"
            return TrainingLoras((), (), why, why)
    rows = [dataset.split_indices("train") for dataset in datasets]
    if data.num_targets:
        rows = [own[: data.num_targets] for own in rows]
    nobody = "" if any(len(own) for own in rows) else f"{datasets[0].path}: has no training LoRAs"
    return TrainingLoras(
        tuple(datasets), tuple(rows), nobody, nobody or _no_pictures(datasets, rows)
    )


def _no_pictures(datasets: Sequence[LoraTargets], rows: Sequence[np.ndarray]) -> str:
    for dataset, own in zip(datasets, rows, strict=True):
        # A dataset is written in one go: the ends and the middle say what all of it is like.
        for i in (own[0], own[len(own) // 2], own[-1]) if len(own) else ():
            subject = dataset[int(i)]
            if not subject.references:
                return f"{dataset.path}: holds no reference pictures (e.g. of {subject.id})"
    return ""


def _embeddings(
    encoder: ImageEncoder,
    dataset: LoraTargets,
    rows: Int[np.ndarray, " t"],
    folder: epath.PathLike | None,
) -> Float[np.ndarray, "t e"]:
    parts = [np.zeros((0, encoder.embedding_dim), np.float32)]
    for start in range(0, len(rows), READ_AT_ONCE):
        subjects = [dataset[int(i)] for i in rows[start : start + READ_AT_ONCE]]
        for subject in subjects:
            if not subject.references:
                raise UserError(
                    f"{dataset.path}: subject {subject.id} has no reference pictures, expected "
                    "some, as others have"
                )
        shown = [
            [pictures.reference_pixels(png, encoder) for png in own.references] for own in subjects
        ]
        flat = np.stack([picture for views in shown for picture in views]).astype(np.float32)
        title = f"encoding references of targets {start + len(shown)}/{len(rows)}"
        pooled = pooled_embeddings(encoder, flat / 255.0, folder, title)
        ends = np.cumsum([len(views) for views in shown])
        parts += [own.mean(axis=0, keepdims=True) for own in np.split(pooled, ends[:-1])]
    return np.concatenate(parts)
