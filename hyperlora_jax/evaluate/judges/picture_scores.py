"""Scores without exact pictures: a judge compares with other pictures of the same subject.

With e(x) the judge's unit embedding and G_s the gallery of subject s,

  1. similarity of a picture x to s: mean over y in G_s of <e(x), e(y)>
  2. identity top-1: whether the true subject's similarity is the largest among n candidates
  3. diversity: variance over captions, relative to the variance over the gallery; undefined (NaN)
     for a subject with one gallery picture

Copying the reference is a control in every table: it tells how alike two real pictures of one
subject are, so a generated picture can hardly score more, and its diversity is 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from etils import epath

from hyperlora_jax.array_types import AnyArray, Float, Int, UInt8
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.evaluate import metrics
from hyperlora_jax.evaluate.judges.judges import Detects, detected, embeddings, mean_embeddings
from hyperlora_jax.evaluate.picture_sets import PictureSet
from hyperlora_jax.evaluate.protocol import unit_pixels


@dataclasses.dataclass(frozen=True, eq=False)
class PictureScores:
    """Scores of one method at one strength, i' identities, c captions."""

    LOSS_TITLE: ClassVar[str] = "distance to the subject’s other pictures"

    top1: Float[np.ndarray, "i c"]
    similarity: Float[np.ndarray, "i c"]
    diversity: Float[np.ndarray, " i"]
    num_failures: int
    taken_for: Int[np.ndarray, "i c"]

    @property
    def loss(self) -> Float[np.ndarray, "i c"]:
        """1 − similarity."""
        return 1.0 - self.similarity

    def columns(self) -> dict[str, np.ndarray]:
        """Scores by the name that metrics.json gives them."""
        return {"identity_top1": self.top1, "similarity": self.similarity}


class PictureScorer:
    """Scores pictures of a `PictureSet`'s first identities by one judge.

    Args:
      judge: an `ImageEncoder`, best one that training never saw.
      detects: picture → whether it shows exactly one subject; where not, all scores are 0.
      folder: see `judges.embeddings`.
    """

    def __init__(
        self,
        judge: ImageEncoder,
        detects: Detects | None = None,
        folder: epath.PathLike | None = None,
    ):
        self.judge, self.detects, self.folder = judge, detects, folder
        self._galleries: dict[int, tuple[PictureSet, np.ndarray]] = {}

    def __call__(
        self, questions: PictureSet, images: Float[AnyArray, "i c h w 3"]
    ) -> PictureScores:
        """Scores of the first len(images) identities; failures and undetected subjects score 0."""
        count = len(images)
        if not 0 < count <= questions.num_identities:
            raise ValueError(
                f"expected pictures of 1 to {questions.num_identities} identities. Got: {count=}"
            )
        pictures = np.asarray(images, np.float32)
        usable = detected(pictures, self.detects)
        embedded = embeddings(self.judge, pictures, self.folder)
        candidates = questions.candidates[:count]
        alike = np.einsum("ice,ine->icn", embedded, self._means(questions)[candidates])
        best = alike == alike.max(axis=2, keepdims=True)
        return PictureScores(
            top1=usable * best[:, :, 0] / best.sum(axis=2),
            similarity=np.where(usable, alike[:, :, 0], 0.0),
            diversity=_diversity(pictures, questions.gallery[:count]),
            num_failures=int((~usable).sum()),
            taken_for=np.take_along_axis(candidates, alike.argmax(axis=2), axis=1),
        )

    def _means(self, questions: PictureSet) -> Float[np.ndarray, "k e"]:
        # <e, mean of the gallery> is equation 1; a set and its `first` share one gallery.
        key = id(questions.gallery)
        if key not in self._galleries:
            gallery = [unit_pixels(own) for own in questions.gallery]
            self._galleries[key] = (
                questions.gallery, mean_embeddings(self.judge, gallery, self.folder)
            )  # fmt: skip
        return self._galleries[key][1]


def _diversity(
    pictures: Float[np.ndarray, "i c h w 3"], gallery: Sequence[UInt8[np.ndarray, "_ h w 3"]]
) -> Float[np.ndarray, " i"]:
    # Variances with n - 1, as there may be fewer pictures in the gallery than captions.
    diversity = np.full(len(pictures), np.nan)
    count = pictures.shape[1]
    for i, own in enumerate(gallery):
        if count > 1 and len(own) > 1:
            (ratio,) = metrics.diversity(pictures[i : i + 1], unit_pixels(own)[None])
            diversity[i] = ratio * count / (count - 1) * (len(own) - 1) / len(own)
    return diversity
