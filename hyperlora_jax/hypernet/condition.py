"""What a hypernetwork is told about a subject: embeddings of its reference pictures, merged.

Several references of a subject become one condition: the mean of the pooled embeddings, and the
tokens of all pictures side by side. A condition of zeros means "unknown": generators that are
trained with condition dropout see it, and guidance extrapolates away from it.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, Bool, Float


@flax.struct.dataclass
class Condition:
    """Conditions of l LoRAs.

    Attributes:
        pooled: [l, e].
        tokens: [l, t, e].
        mask: [l, t], which tokens are real; None is all of them.
    """

    pooled: Float[Array, "l e"]
    tokens: Float[Array, "l t e"]
    mask: Bool[Array, "l t"] | None = None


def merge_references(
    pooled: Float[Array, "l k e"],
    tokens: Float[Array, "l k m e"],
    given: Bool[Array, "l k"] | None = None,
) -> Condition:
    """Embeddings of k references per subject as one condition; `given` says which count."""
    num_loras, _, per_picture, width = tokens.shape
    merged = tokens.reshape(num_loras, -1, width)
    if given is None:
        return Condition(jnp.mean(pooled, axis=1), merged)
    weight = given[..., None].astype(pooled.dtype)
    mean = jnp.sum(pooled * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
    return Condition(mean, merged, jnp.repeat(given, per_picture, axis=1))


def unknown(condition: Condition, which: Bool[Array, " l"] | None = None) -> Condition:
    """The same with the chosen subjects (None: all) unknown."""
    keep = jnp.zeros(len(condition.pooled)) if which is None else 1.0 - which
    return dataclasses.replace(
        condition,
        pooled=condition.pooled * keep[:, None].astype(condition.pooled.dtype),
        tokens=condition.tokens * keep[:, None, None].astype(condition.tokens.dtype),
    )


def dropped(condition: Condition, rate: float, key: Array) -> Condition:
    """Every subject becomes unknown with probability `rate`."""
    if rate == 0.0:
        return condition
    return unknown(condition, jax.random.bernoulli(key, rate, (len(condition.pooled),)))


def both(condition: Condition) -> Condition:
    """[l] → [2l]: as it is, then unknown: one batch for guidance."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, unknown(condition))


def repeated(condition: Condition, count: int) -> Condition:
    """Every subject `count` times in a row."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), condition)
