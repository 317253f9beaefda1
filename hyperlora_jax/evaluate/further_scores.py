"""Scores by models that the user brings, beside those that every run has.

clip_text  CLIP-T, cosine of picture and prompt        `evaluate.clip`, a local CLIP folder
lpips      perceptual distance to the exact picture    `evaluate.lpips`, weights of `lpips.py`
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hyperlora_jax.evaluate.compare import MethodResult
from hyperlora_jax.evaluate.judges import clip_text_similarity
from hyperlora_jax.evaluate.picture_sets import AnySet


def further_scores(
    section: Any, results: Mapping[str, MethodResult], test: AnySet
) -> dict[str, dict[str, np.ndarray]]:
    """{score: {method: [i', c]}} of a config's `evaluate` section; empty where nothing is asked.

    Raises:
        UserError: a path that holds no such model.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    if section.clip:
        found["clip_text"] = {
            name: clip_text_similarity(
                section.clip, result.images, test.captions[: len(result.images)]
            )
            for name, result in results.items()
        }
    return found
