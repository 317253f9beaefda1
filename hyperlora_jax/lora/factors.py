"""What one does with down/up pairs: create, stack, scale, join, add to weights.

All functions are pure and work on single LoRAs and on batches (leading axis l).
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperlora_jax.array_types import AnyArray, Array, Float, Int, Params, PRNGKey
from hyperlora_jax.lora.sites import LoraSpec, tree_from_sites


def init(
    key: PRNGKey,
    spec: LoraSpec,
    num_loras: int | None = None,
    down_std: float | None = None,
    shared: bool = False,
) -> Params:
    """Normal down, zero up: delta = 0. float32.

    `down_std` None means 1/sqrt(3 · fan_in), the spread of PEFT's default. A site's numbers
    depend on the key and its own path only, so adding sites does not change the others. With
    `shared`, the LoRAs of a batch start from the same factors (what makes their raw factors
    comparable later).
    """
    lead = () if num_loras is None else (num_loras,)
    pairs = {}
    for site in spec.sites:
        std = (3 * site.fan_in) ** -0.5 if down_std is None else down_std
        site_key = jax.random.fold_in(key, zlib.crc32(site.path.encode()))
        drawn = () if shared else lead
        down = std * jax.random.normal(site_key, (*drawn, *site.down_shape))
        pairs[site.path] = {
            "down": jnp.broadcast_to(down, (*lead, *site.down_shape)),
            "up": jnp.zeros((*lead, *site.up_shape)),
        }
    return tree_from_sites(pairs)


def zeros(spec: LoraSpec, num_loras: int | None = None) -> Params:
    """A LoRA of zeros in both factors, float32."""
    lead = () if num_loras is None else (num_loras,)
    return tree_from_sites(
        {
            site.path: {
                "down": jnp.zeros((*lead, *site.down_shape)),
                "up": jnp.zeros((*lead, *site.up_shape)),
            }
            for site in spec.sites
        }
    )


def is_site(tree: object) -> bool:
    """True for a {"down", "up"} pair: use as `is_leaf` to map over sites."""
    return isinstance(tree, dict) and set(tree) == {"down", "up"}


def num_loras(lora: Params) -> int | None:
    """Length of the leading axis, or None for a single LoRA."""
    pair = next(iter(jax.tree.leaves(lora, is_leaf=is_site)), None)
    if pair is None or not is_site(pair):
        raise ValueError("num_loras expects a LoRA tree with at least one site, got an empty one")
    return pair["up"].shape[0] if pair["up"].ndim == 3 else None


def delta(factors: Params) -> Float[AnyArray, "..."]:
    """down · up of one site in its kernel layout, [l?, in, out] or [l?, kh, kw, in, out]."""
    down, up = factors["down"], factors["up"]
    if up.ndim == 3 and down.ndim == 5:
        return jnp.einsum("lhwir,lro->lhwio", down, up)
    return down @ up


def scale(lora: Params, strength: float | Float[AnyArray, ""] | Float[AnyArray, " l"]) -> Params:
    """Multiplies every delta by the strength, one number or one for each LoRA of a batch."""
    if not isinstance(strength, jax.Array):  # numbers leave numpy's LoRAs in numpy
        strength = np.asarray(strength, np.float32)
    if strength.ndim == 1 and num_loras(lora) != strength.shape[0]:
        raise ValueError(f"scale: {strength.shape[0]} strengths, but {num_loras(lora)} LoRAs")
    factor = strength[:, None, None] if strength.ndim == 1 else strength

    def scale_site(pair):
        return {"down": pair["down"], "up": (pair["up"] * factor).astype(pair["up"].dtype)}

    return jax.tree.map(scale_site, lora, is_leaf=is_site)


def stack(loras: Sequence[Params]) -> Params:
    """A batch from single LoRAs of one spec."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *loras)


def stack_padded(loras: Sequence[Params]) -> Params:
    """A batch from single LoRAs whose ranks or sites differ: zeros fill what one of them lacks.

    Every delta stays what it is.
    """
    trees: list[dict[tuple[str, ...], Any]] = [flatten_dict(lora) for lora in loras]
    stacked = {}
    for path in sorted(set().union(*trees)):
        leaves = [tree.get(path) for tree in trees]
        largest = max((leaf for leaf in leaves if leaf is not None), key=lambda leaf: leaf.size)
        stacked[path] = jnp.stack([_grown(leaf, largest) for leaf in leaves])
    return unflatten_dict(stacked)


def _grown(leaf: AnyArray | None, to: AnyArray) -> Array:
    if leaf is None:
        return jnp.zeros(to.shape, to.dtype)
    return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, to.shape, strict=True)])


def index(lora: Params, i: int | slice | Int[np.ndarray, " n"]) -> Params:
    """LoRA i of a batch (a slice or several numbers keep the leading axis)."""
    return jax.tree.map(lambda leaf: leaf[i], lora)


def repeat(lora: Params, num: int) -> Params:
    """A batch of `num` equal LoRAs from a single one."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num, *leaf.shape)), lora)


def concatenate_ranks(a: Params, b: Params) -> Params:
    """The LoRA whose delta is the sum of both, exactly; ranks add. A site of one only is kept."""
    if is_site(a) and is_site(b):
        return {
            "down": jnp.concatenate([a["down"], b["down"]], axis=-1),
            "up": jnp.concatenate([a["up"], b["up"]], axis=-2),
        }
    return {
        name: concatenate_ranks(a[name], b[name]) if name in a and name in b
        else a[name] if name in a else b[name]
        for name in sorted({*a, *b})
    }  # fmt: skip
