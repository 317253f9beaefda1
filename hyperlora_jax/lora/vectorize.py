"""LoRA tree <-> flat vector, and standard deviations of both.

Flat vector: sites in spec order, down then up, each in PyTorch's memory order, i.e. lora_A
(r, in[, kh, kw]) and lora_B (out, r) row by row. For the preset "w2w" at rank 1 this is the
layout of weights2weights, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Array, Float, Params
from hyperlora_jax.lora.sites import LoraSpec, site_factors, tree_from_sites


def flatten(lora: Params, spec: LoraSpec) -> Float[Array, "*l d"]:
    """One vector for each LoRA, [d] or [l, d]."""
    parts = []
    for site in spec.sites:
        pair = site_factors(lora, site)
        lead = pair["up"].shape[:-2]
        down = jnp.moveaxis(pair["down"], (-1, -2), (len(lead), len(lead) + 1))
        parts += [down.reshape(*lead, -1), jnp.swapaxes(pair["up"], -1, -2).reshape(*lead, -1)]
    return jnp.concatenate(parts, axis=-1)


@functools.partial(jax.jit, static_argnames="spec", inline=True)
def unflatten(vector: Float[AnyArray, "*l d"], spec: LoraSpec) -> Params:
    """Inverse of `flatten`. Raises ValueError when d is not the spec's number of parameters."""
    if vector.shape[-1] != spec.num_parameters:
        raise ValueError(f"unflatten: {vector.shape[-1]} numbers, spec has {spec.num_parameters}")
    lead = vector.shape[:-1]
    pairs, start = {}, 0
    for site in spec.sites:
        window = site.kernel_size if site.kind == "conv" else ()
        down_size, up_size = site.rank * site.fan_in, site.rank * site.out_features
        down = vector[..., start : start + down_size]
        down = down.reshape(*lead, site.rank, site.in_features, *window)
        up = vector[..., start + down_size : start + down_size + up_size]
        pairs[site.path] = {
            "down": jnp.moveaxis(down, (len(lead), len(lead) + 1), (-1, -2)),
            "up": jnp.swapaxes(up.reshape(*lead, site.out_features, site.rank), -1, -2),
        }
        start += down_size + up_size
    return tree_from_sites(pairs)


def element_spread(std: Float[AnyArray, " m"], spec: LoraSpec) -> Float[Array, " d"]:
    """One number per factor, in vector order (down then up, site by site), for every element."""
    sizes = []
    for site in spec.sites:
        sizes += [site.rank * site.fan_in, site.rank * site.out_features]
    return jnp.asarray(std)[np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)]


def spread_tree(std: Float[AnyArray, " m"], spec: LoraSpec) -> Params:
    """One number per factor in vector order as a LoRA tree."""
    pairs = {
        site.path: {"down": jnp.asarray(std)[2 * k], "up": jnp.asarray(std)[2 * k + 1]}
        for k, site in enumerate(spec.sites)
    }
    return tree_from_sites(pairs)
