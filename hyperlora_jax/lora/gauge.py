"""Many factor pairs make one delta: down·G, G⁻¹·up for any invertible G. Here one is chosen.

    raw         the factors as they are
    svd         down = Q_d U √σ, up = √σ Vᵀ Q_uᵀ with QR of both factors and the SVD of the r×r
                core: balanced, σ descending; signs by inner product with the reference, or the
                largest entry of each up row positive
    procrustes  the balanced pair turned by the orthogonal matrix that brings it closest to the
                reference (for targets that share an initialisation or a mean)
Never builds an in×out matrix: O(r²(in+out)).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, Float, Params
from hyperlora_jax.lora.decompositions import polar, small_svd, thin_qr
from hyperlora_jax.lora.factors import is_site
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors, tree_from_sites

Gauge = Literal["raw", "svd", "procrustes"]


def canonical(
    lora: Params, spec: LoraSpec, kind: Gauge = "raw", reference: Params | None = None
) -> Params:
    """The same deltas in the chosen gauge; ranks stay. Idempotent for a fixed reference.

    `reference` is a single LoRA of the spec (usually the training mean): optional for "svd"
    (signs), required for "procrustes".
    """
    if kind == "raw":
        return lora
    if kind == "procrustes" and reference is None:
        raise ValueError("gauge 'procrustes' needs a reference LoRA, got None")
    if kind not in ("svd", "procrustes"):
        raise ValueError(f"gauge {kind!r} is unknown; expected 'raw', 'svd' or 'procrustes'")
    return _map_sites(lora, spec, kind, reference, None)


def truncate(lora: Params, spec: LoraSpec, rank: int) -> tuple[Params, LoraSpec]:
    """Best approximation of every delta at this rank (svd gauge) and its spec.

    A smaller site is zero-padded to the rank, which keeps its delta exactly.
    """
    cut = _map_sites(lora, spec, "svd", None, rank)
    return cut, spec.with_rank(rank)


def lower_ranks(lora: Params, spec: LoraSpec, rank: int) -> tuple[Params, LoraSpec]:
    """Best approximation of every delta at this rank; a site that has less, or a layer narrower
    than that, keeps what it has."""
    limits = {site.path: min(rank, site.fan_in, site.out_features) for site in spec.sites}
    return _cut(lora, spec, limits)


def cut_above_width(lora: Params, spec: LoraSpec) -> tuple[Params, LoraSpec]:
    """The same deltas, without the components that a rank above both widths of a layer has too
    many."""
    wide = [site for site in spec.sites if site.rank > max(site.fan_in, site.out_features)]
    return _cut(lora, spec, {site.path: min(site.fan_in, site.out_features) for site in wide})


def _cut(lora: Params, spec: LoraSpec, limits: Mapping[str, int]) -> tuple[Params, LoraSpec]:
    pairs = {site.path: site_factors(lora, site) for site in spec.sites}
    new = {}
    for site in spec.sites:
        if site.rank > (limit := limits.get(site.path, site.rank)):
            new.setdefault(limit, []).append(site)
    if not new:
        return lora, spec
    sites = spec.by_path
    for rank, those in new.items():
        cut, part = truncate(lora, LoraSpec(tuple(those)), rank)
        pairs |= {site.path: site_factors(cut, site) for site in part.sites}
        sites = {**sites, **part.by_path}
    return tree_from_sites(pairs), LoraSpec(tuple(sites.values()))


def pad_rank(lora: Params, rank: int) -> Params:
    """Zero columns and rows up to the rank: the same deltas. Raises ValueError if above it."""

    def pad(pair):
        more = rank - pair["up"].shape[-2]
        if more < 0:
            raise ValueError(f"pad_rank: a site has rank {pair['up'].shape[-2]}, above {rank}")
        lead = [(0, 0)] * (pair["up"].ndim - 2)
        down = jnp.pad(pair["down"], [(0, 0)] * (pair["down"].ndim - 1) + [(0, more)])
        return {"down": down, "up": jnp.pad(pair["up"], [*lead, (0, more), (0, 0)])}

    return jax.tree.map(pad, lora, is_leaf=is_site)


def _matrices(pair: Params, site: LoraSite) -> tuple[Array, Array]:
    """(down [l?, fan_in, r], up [l?, r, out]) in float32."""
    up = jnp.asarray(pair["up"], jnp.float32)
    down = jnp.asarray(pair["down"], jnp.float32)
    return down.reshape(*up.shape[:-2], site.fan_in, site.rank), up


def _balanced(down: Array, up: Array, rank: int) -> tuple[Array, Array]:
    """SVD form of down·up with `rank` components (cut or zero-padded), signs undecided."""
    if down.shape[1] == 1:
        return _pad_components(*_balanced_vectors(down, up), rank)
    basis_down, tri_down = thin_qr(down)
    basis_up, tri_up = thin_qr(up.T)
    left, sigma, right = small_svd(tri_down @ tri_up.T)
    keep = min(rank, sigma.shape[0])
    root = jnp.sqrt(sigma[:keep])
    new_down = basis_down @ (left[:, :keep] / jnp.where(root > 0, root, 1.0))
    new_up = root[:, None] * (basis_up @ right[:, :keep]).T
    return _pad_components(new_down, new_up, rank)


def _balanced_vectors(down: Array, up: Array) -> tuple[Array, Array]:
    """A column and a row of the same product, scaled to one length: what rank 1 comes to."""
    length_down, length_up = jnp.linalg.norm(down), jnp.linalg.norm(up)
    root = jnp.sqrt(length_down) * jnp.sqrt(length_up)
    return (
        down * jnp.where(length_down > 0, root / length_down, 0.0),
        up * jnp.where(length_up > 0, root / length_up, 0.0),
    )


def _pad_components(down: Array, up: Array, rank: int) -> tuple[Array, Array]:
    more = rank - down.shape[1]
    return jnp.pad(down, ((0, 0), (0, more))), jnp.pad(up, ((0, more), (0, 0)))


def _signs(down: Array, up: Array, reference: tuple[Array, Array] | None) -> Array:
    """±1 for each component [r]."""
    largest = up.max(axis=1) + up.min(axis=1)  # has the sign of the largest entry
    decided = largest
    if reference is not None:
        inner = jnp.sum(down * reference[0], axis=0) + jnp.sum(up * reference[1], axis=1)
        decided = jnp.where(jnp.abs(inner) > 0, inner, largest)
    return jnp.where(decided < 0, -1.0, 1.0)


def _rotation(down: Array, up: Array, reference: tuple[Array, Array]) -> Array:
    """Orthogonal Q [r, r] that minimises ‖down·Q - ref_down‖² + ‖Qᵀ·up - ref_up‖²."""
    return polar(down.T @ reference[0] + up @ reference[1].T)


@functools.partial(jax.jit, static_argnames=("kind", "rank"))
def _convert(
    down: Float[AnyArray, "n l m r"],
    up: Float[AnyArray, "n l r o"],
    reference: tuple[Float[AnyArray, "n m s"], Float[AnyArray, "n s o"]] | None,
    kind: Gauge,
    rank: int,
) -> tuple[Float[Array, "n l m s"], Float[Array, "n l s o"]]:
    """n sites of one shape, l LoRAs each."""

    def one(down, up, target):
        down, up = _balanced(down, up, rank)
        if kind == "procrustes":
            turn = _rotation(down, up, target)
            return down @ turn, turn.T @ up
        sign = _signs(down, up, target)
        return down * sign, sign[:, None] * up

    return jax.vmap(jax.vmap(one, (0, 0, None)))(down, up, reference)


def _map_sites(
    lora: Params, spec: LoraSpec, kind: Gauge, reference: Params | None, rank: int | None
) -> Params:
    """Sites of equal shape go through one compiled call. `rank` None keeps each site's own."""
    groups: dict[tuple[int, int, int], list[LoraSite]] = {}
    for site in spec.sites:
        groups.setdefault((site.fan_in, site.out_features, site.rank), []).append(site)
    pairs = {}
    for sites in groups.values():
        matrices = [_matrices(site_factors(lora, site), site) for site in sites]
        single = matrices[0][1].ndim == 2
        down, up = (jnp.stack(side) for side in zip(*matrices, strict=True))
        target = None
        if reference is not None:
            targets = [_matrices(site_factors(reference, site), site) for site in sites]
            target = tuple(jnp.stack(side) for side in zip(*targets, strict=True))
        if single:
            down, up = down[:, None], up[:, None]
        down, up = _convert(down, up, target, kind, rank or sites[0].rank)
        for i, site in enumerate(sites):
            new = dataclasses.replace(site, rank=rank or site.rank)
            lead = () if single else up.shape[1:2]
            site_down, site_up = (down[i, 0], up[i, 0]) if single else (down[i], up[i])
            pairs[site.path] = {"down": site_down.reshape(*lead, *new.down_shape), "up": site_up}
    return tree_from_sites(pairs)
