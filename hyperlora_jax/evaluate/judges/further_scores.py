"""Scores by models that the user brings, beside those that every run has.

clip_text  CLIP-T, cosine of picture and prompt        `evaluate.clip`, a local CLIP folder
lpips      perceptual distance to the exact picture    `evaluate.lpips`, see `lpips.py`
"""

from collections.abc import Callable, Mapping

import numpy as np
from ml_collections import ConfigDict

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.judges.judges import load_clip
from hyperlora_jax.evaluate.judges.lpips import load_lpips
from hyperlora_jax.evaluate.metrics import is_finite
from hyperlora_jax.evaluate.picture_sets import AnySet
from hyperlora_jax.evaluate.protocol import EvaluationSet

# Pictures [i', c, h, w, 3] of the first identities -> scores [i', c]
Further = Callable[[np.ndarray], np.ndarray]
WORST_LPIPS = 1.0  # of a picture that is not finite


def further_scorers(section: ConfigDict, test: AnySet) -> dict[str, Further]:
    """{score: function of pictures} of a config's `evaluate` section; models are loaded at once.

    Raises:
        UserError: a path that holds no such model, or LPIPS without exact pictures.
    """
    scorers: dict[str, Further] = {}
    if section.clip:
        clip = load_clip(section.clip)
        scorers["clip_text"] = lambda images: clip.similarity(images, test.captions[: len(images)])
    if section.lpips:
        if not isinstance(test, EvaluationSet):
            raise UserError(
                f"evaluate.lpips: {test.facts['source']} has no exact pictures to compare with, "
                "expected none"
            )
        lpips, exact = load_lpips(section.lpips), test.exact

        def distance(images: np.ndarray) -> np.ndarray:
            distances = lpips.distance(images, exact[: len(images)])
            return np.where(is_finite(images), distances, WORST_LPIPS)

        scorers["lpips"] = distance
    return scorers


def further_scores(
    scorers: Mapping[str, Further], images: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """{score: {method: [i', c]}} of pictures by method."""
    return {
        score: {name: function(drawn) for name, drawn in images.items()}
        for score, function in scorers.items()
    }
