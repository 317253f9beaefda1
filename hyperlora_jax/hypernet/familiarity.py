"""Does the hypernetwork know such subjects? How a reference compares with those it was trained on.

    similarity(x)   cosine of x's pooled embedding and the nearest training subject's
    familiarity(x)  share of training subjects that are less similar to their own nearest neighbour

A subject like those of training scores anywhere in (0, 1), uniformly on average; a reference from
another domain (a landscape for a model of faces) scores near 0: no training subject is as far off.
"""

import numpy as np

from hyperlora_jax.array_types import AnyArray, Float, Params, Rows
from hyperlora_jax.hypernet.baselines import unit

UNFAMILIAR = 0.02  # below, hardly a subject of the training was as unlike all others
BLOCK = 256  # subjects that are compared with all at once


def fit(means: Float[np.ndarray, "n e"], singles: Rows) -> Params:
    """What is kept with a checkpoint: {"known": [n, e] unit embeddings, "typical": [n] ascending
    similarities of one picture of a subject to the nearest other subject}.

    Args:
        means: mean embeddings of the pictures of n training subjects, of each its own number.
        singles: [n, e], the embedding of one picture of each; read in blocks, as there may be
            many subjects.
    """
    trained = unit(np.asarray(means, np.float32))
    del means
    typical = np.empty(len(trained), np.float32)
    for start in range(0, len(trained), BLOCK):
        asked = unit(np.asarray(singles[start : start + BLOCK], np.float32))
        similarity = asked @ trained.T
        similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = -1.0
        typical[start : start + BLOCK] = similarity.max(axis=1)
    return {"known": trained, "typical": np.sort(typical)}


def score(constants: Params, pooled: Float[AnyArray, "l k e"]) -> Float[np.ndarray, " l"]:
    """Familiarity of subjects told by k pictures each, in [0, 1]."""
    asked = unit(np.asarray(pooled).mean(axis=1))
    nearest = (asked @ np.asarray(constants["known"]).T).max(axis=1)
    typical = np.asarray(constants["typical"])
    return np.searchsorted(typical, nearest, side="right") / len(typical)
