"""Distances between LoRAs, one number for each LoRA of a batch ([l], or [] for a single one).

(1) whitened_error   mean over factor matrices of the mean squared whitened difference
(2) delta_inner      Σ_sites <D U, D' U'>_F = Σ tr((DᵀD')(U'Uᵀ)): r×r Gram matrices, O(r²(in+out))
(3) delta_error      Σ_sites ‖D U - D' U'‖²_F, by the split D U - D' U' = D(U - U') + (D - D')U'
                     whose Gram form loses no digits when both are close
(2) and (3) do not see the gauge and never build an in×out matrix.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, Float, Params
from hyperlora_jax.lora.factors import is_site


def whitened_error(predicted: Params, target: Params, spread: Params) -> Float[Array, "*l"]:
    """(1): every factor matrix counts the same, so that wide sites do not dominate. `spread` is a
    LoRA tree of one standard deviation for each factor."""
    lead = jax.tree.leaves(target, is_leaf=is_site)[0]["up"].ndim - 2

    def of_matrix(x: AnyArray, y: AnyArray, std: AnyArray) -> Array:
        return jnp.mean(((x - y) / std) ** 2, axis=range(lead, x.ndim))

    errors = jax.tree.leaves(jax.tree.map(of_matrix, predicted, target, spread))
    return functools.reduce(operator.add, errors) / len(errors)


def delta_inner(a: Params, b: Params) -> Float[Array, "*l"]:
    """(2): inner product of the deltas, summed over sites."""
    return _sum_sites(a, b, lambda da, ua, db, ub: _inner(da, ua, db, ub))


def delta_error(predicted: Params, target: Params) -> Float[Array, "*l"]:
    """(3): squared Frobenius distance of the deltas, summed over sites."""
    return _sum_sites(predicted, target, _squared_distance)


def relative_delta_error(predicted: Params, target: Params) -> Float[Array, "*l"]:
    """Square root of (3) over the norm of the target's deltas: 0 exact, 1 as good as no LoRA."""
    norm = jnp.maximum(delta_inner(target, target), jnp.finfo(jnp.float32).tiny)
    return jnp.sqrt(jnp.maximum(delta_error(predicted, target), 0.0) / norm)


def delta_cosine(a: Params, b: Params) -> Float[Array, "*l"]:
    """Cosine between the deltas of all sites together; 0 when one of them is zero."""
    norms = jnp.maximum(delta_inner(a, a), 0.0) * jnp.maximum(delta_inner(b, b), 0.0)
    return delta_inner(a, b) / jnp.sqrt(jnp.maximum(norms, jnp.finfo(jnp.float32).tiny))


def _inner(
    da: Float[AnyArray, "*l m p"],
    ua: Float[AnyArray, "*l p o"],
    db: Float[AnyArray, "*l m q"],
    ub: Float[AnyArray, "*l q o"],
) -> Float[Array, "*l"]:
    gram_down = jnp.einsum("...mp,...mq->...pq", da, db)
    gram_up = jnp.einsum("...po,...qo->...pq", ua, ub)
    return jnp.sum(gram_down * gram_up, axis=(-1, -2))


def _squared_distance(da, ua, db, ub):
    if ua.shape[-2] == ub.shape[-2]:
        down, up = jnp.concatenate([da, da - db], -1), jnp.concatenate([ua - ub, ub], -2)
    else:
        down, up = jnp.concatenate([da, db], -1), jnp.concatenate([ua, -ub], -2)
    return _inner(down, up, down, up)


def _sum_sites(a: Params, b: Params, function) -> Float[Array, "*l"]:
    def one(pair, other):
        lead, lead_other = pair["up"].shape[:-2], other["up"].shape[:-2]
        down = pair["down"].reshape(*lead, -1, pair["up"].shape[-2])
        down_other = other["down"].reshape(*lead_other, -1, other["up"].shape[-2])
        return function(down, pair["up"], down_other, other["up"])

    sites = jax.tree.leaves(jax.tree.map(one, a, b, is_leaf=is_site))
    return functools.reduce(operator.add, sites)
