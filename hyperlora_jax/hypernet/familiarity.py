"""Does the hypernetwork know such subjects? How a reference compares with those it was trained on.

    similarity(x)   cosine of x's pooled embedding and the nearest training subject's
    familiarity(x)  share of training subjects that are less similar to their own nearest neighbour

A subject like those of training scores anywhere in (0, 1), uniformly on average; a reference from
another domain (a landscape for a model of faces) scores near 0: no training subject is as far off.
"""

import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Float, Params

BLOCK = 1024


def fit(means: Float[np.ndarray, "n e"], singles: Float[np.ndarray, "n e"]) -> Params:
    """What is kept with a checkpoint: {"known": [n, e] unit embeddings, "typical": [n] ascending
    similarities of one picture of a subject to the nearest other subject}.

    Args:
        means: mean embeddings of the pictures of n training subjects, of each its own number.
        singles: the embedding of one picture of each.
    """
    known, asked = _unit(means), _unit(singles)
    typical = np.empty(len(known), np.float32)
    for start in range(0, len(known), BLOCK):
        rows = slice(start, start + BLOCK)
        similarity = asked[rows] @ known.T
        similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = -1.0
        typical[rows] = similarity.max(axis=1)
    return {"known": known.astype(np.float32), "typical": np.sort(typical)}


def score(kept: Params, pooled: Float[AnyArray, "l k e"]) -> Float[np.ndarray, " l"]:
    """Familiarity of subjects told by k pictures each, in [0, 1]."""
    asked = _unit(np.asarray(pooled).mean(axis=1))
    nearest = np.asarray(jnp.asarray(asked) @ jnp.asarray(kept["known"]).T).max(axis=1)
    typical = np.asarray(kept["typical"])
    return np.searchsorted(typical, nearest, side="right") / len(typical)


def _unit(embeddings: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n e"]:
    return embeddings / (np.linalg.norm(embeddings, axis=1, keepdims=True) + 1e-9)
