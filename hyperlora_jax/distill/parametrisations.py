"""What a fit trains: numbers that become a LoRA.

    Factors   down and up themselves: the conventional fit
    Added     a new LoRA beside a frozen one of the slot's own: rank-relaxed refinement
              (HyperDreamBooth, arXiv 2307.06949); the sum is exact, by joining ranks
    Mixture   Σ_k c_k basis_k with LoRA vectors that are frozen: the linear combination of existing
              LoRAs (2412.02352)

All satisfy the Protocol `Parametrisation`. They are static arguments of the compiled step; arrays
are passed beside them: `start` belongs to a slot, `shared` to all slots.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Array, ArrayTree, Float, Params
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSpec

MIXTURES = ("global", "site", "factor")


@runtime_checkable
class Parametrisation(Protocol):
    """Trained numbers ⇄ LoRA."""

    @property
    def spec(self) -> LoraSpec:
        """The finished LoRA's sites and ranks."""
        ...

    def init(self, key: Array) -> Params:
        """What is trained, of one LoRA, before the first step; `key` is its own."""
        ...

    def lora(self, params: Params, start: Params | None, shared: Params | None) -> Params:
        """Folded LoRA tree with leading axis s of parameters with leading axis s."""
        ...


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of a LoRA: random down side, zero up side.

    Attributes:
        alpha: the fit trains up · alpha / rank, as LoRA trainers do.
        init_seed: one down side for all LoRAs; None draws one for each.
    """

    spec: LoraSpec
    alpha: float | None = None
    init_seed: int | None = 0

    def init(self, key: Array) -> Params:
        """See `Parametrisation`."""
        if self.init_seed is not None:
            return factors.init(jax.random.key(self.init_seed), self.spec)
        return factors.init(jax.random.fold_in(key, 1), self.spec)

    def lora(self, params: Params, start: Params | None, shared: Params | None) -> Params:
        """See `Parametrisation`."""
        del start, shared
        scale = 1.0 if self.alpha is None else self.alpha / self.spec.max_rank
        return factors.scale(params, scale)


@dataclasses.dataclass(frozen=True)
class Added:
    """`start` stays as it is; `added` describes the LoRA that is trained beside it."""

    start_spec: LoraSpec
    added: Factors

    @property
    def spec(self) -> LoraSpec:
        """Ranks of both together."""
        ranks = {site.path: site.rank for site in self.start_spec.sites}
        return LoraSpec(
            tuple(
                dataclasses.replace(site, rank=site.rank + ranks[site.path])
                for site in self.added.spec.sites
            )
        )

    def init(self, key: Array) -> Params:
        """See `Parametrisation`."""
        return self.added.init(key)

    def lora(self, params: Params, start: Params | None, shared: Params | None) -> Params:
        """See `Parametrisation`."""
        if start is None:
            raise ValueError("Added needs a start LoRA for every slot, got None")
        return factors.concatenate_ranks(start, self.added.lora(params, None, shared))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Coefficients of frozen LoRA vectors, on raw factors.

    `shared` is what `arrange` makes of the basis.

    Attributes:
        num_basis: k.
        per: one coefficient per basis LoRA ("global"), per site, or per factor (down and up).
    """

    spec: LoraSpec
    num_basis: int
    per: str = "global"

    def __post_init__(self):
        if self.per not in MIXTURES:
            raise ValueError(f"Got: {self.per=}, expected one of {MIXTURES}")

    def init(self, key: Array) -> Params:
        """Coefficients [groups, k], all 1 / k."""
        del key
        groups = {"global": 1, "site": len(self.spec), "factor": 2 * len(self.spec)}[self.per]
        return {"coefficients": jnp.full((groups, self.num_basis), 1.0 / self.num_basis)}

    def lora(self, params: Params, start: Params | None, shared: Params | None) -> Params:
        """See `Parametrisation`."""
        del start
        if shared is None:
            raise ValueError("Mixture needs shared basis LoRAs, got None")
        mixed = jnp.einsum("sgk,gkm->sgm", params["coefficients"], shared["basis"])
        padded = mixed.reshape(len(mixed), -1)
        return vectorize.unflatten(padded[:, self._places()[1]], self.spec)

    def arrange(self, basis: Float[np.ndarray, "k d"]) -> Params:
        """{"basis": [groups, k, most]}: the numbers of a group side by side, so that mixing is one
        batched product; groups with fewer numbers are filled up."""
        if len(basis) != self.num_basis:
            raise ValueError(f"expected {self.num_basis} basis LoRAs. Got: {len(basis)=}")
        gathered = np.asarray(basis, np.float32)[:, self._places()[0]]
        return {"basis": jnp.asarray(gathered.swapaxes(0, 1))}

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """([groups, most], which element of the vector stands there; [d], where an element is)."""
        sizes = []
        for site in self.spec.sites:
            sizes += [site.rank * site.fan_in, site.rank * site.out_features]
        if self.per == "global":
            sizes = [sum(sizes)]
        elif self.per == "site":
            sizes = [a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
        most, first = max(sizes), 0
        elements, places = np.zeros((len(sizes), most), np.int32), []
        for group, size in enumerate(sizes):
            elements[group, :size] = np.arange(first, first + size)
            places.append(group * most + np.arange(size, dtype=np.int32))
            first += size
        return elements, np.concatenate(places)


def one_lora(
    parametrisation: Parametrisation,
    params: Params,
    start: ArrayTree,
    shared: ArrayTree,
    index: int,
) -> Params:
    """The folded LoRA of one slot, without leading axis, on the host."""
    own, own_start = jax.device_get(jax.tree.map(lambda leaf: _row(leaf, index), (params, start)))
    return jax.device_get(factors.index(parametrisation.lora(own, own_start, shared), 0))


def _row(rows: AnyArray, index: int) -> AnyArray:
    """`rows[index : index + 1]`, from the device that holds it: slicing the whole array would be a
    program of all devices for every matrix of a LoRA."""
    if not isinstance(rows, jax.Array):
        return rows[index : index + 1]
    for shard in rows.addressable_shards:
        first, end, _ = shard.index[0].indices(len(rows))
        if first <= index < end:
            return shard.data[index - first : index - first + 1]
    raise IndexError(f"row {index} of {rows.shape} is on no device of this process")
