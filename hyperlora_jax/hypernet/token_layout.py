"""Which token of the hypernetwork writes which numbers of the LoRA.

A token owns `components` consecutive rank components of one side (down or up) of one site, that is
`components * width` numbers, width = fan-in of the down side or fan-out of the up side. Tokens of
equal side and width form a group: one dense array `[l, n, components, width]` of static shape,
whatever mixture of widths and ranks the LoRA has.

Heads turn token states into the numbers of the LoRA.

`dense`       one linear map per group, shared by its tokens;
`per_token`   one linear map per token, for few sites: what a site needs differs from site to site;
`basis`       coefficients of `basis_size` learned directions per token (HyperLoRA, 2503.16944);
`orthogonal`  coefficients of a frozen orthonormal basis per group (HyperDreamBooth's lightweight
              basis, arXiv 2307.06949): few numbers to predict, none of them learned here.

With `zero` a head writes zeros at first: the up side always does, so that an untrained
hypernetwork writes the base model.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Array, DType, Float, Params
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, module_path

SIDES = ("down", "up")


@dataclasses.dataclass(frozen=True)
class TokenGroup:
    """Tokens of one side and width; `sites[k]`, `first_components[k]` say what token k writes."""

    side: str
    width: int
    sites: tuple[int, ...]
    first_components: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Static description of all tokens of one LoraSpec, in group order."""

    spec: LoraSpec
    components: int
    groups: tuple[TokenGroup, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of one LoRA over all groups."""
        return sum(len(group.sites) for group in self.groups)


def side_width(site: LoraSite, side: str) -> int:
    """Numbers of one rank component of one side: k·k·in for down, out for up."""
    return math.prod(site.kernel_size) * site.in_features if side == "down" else site.out_features


def make_layout(spec: LoraSpec, components: int | None = None) -> TokenLayout:
    """Token layout of a spec.

    Args:
        spec: the adapted sites.
        components: rank components per token; None = all of a site's rank in one token.

    Raises:
        ValueError: a site's rank is no multiple of `components`.
    """
    ranks = {site.rank for site in spec.sites}
    if components is None:
        if len(ranks) != 1:
            raise ValueError(f"components=None needs one rank for all sites. Got: {sorted(ranks)=}")
        components = ranks.pop()
    tokens: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for index, site in enumerate(spec.sites):
        if site.rank % components:
            raise ValueError(
                f"{site.path}: rank {site.rank} is no multiple of {components=} per token"
            )
        for side in SIDES:
            starts = range(0, site.rank, components)
            tokens[side, side_width(site, side)] += [(index, start) for start in starts]
    groups = tuple(
        TokenGroup(side, width, *map(tuple, zip(*entries, strict=True)))
        for (side, width), entries in sorted(tokens.items())
    )
    return TokenLayout(spec, components, groups)


def token_features(layout: TokenLayout) -> dict[str, np.ndarray]:
    """Integer features of every token, for learned embeddings: site, block, projection, side,
    component, each int32 `[n]` in group order."""
    blocks: dict[str, int] = {}
    projections: dict[str, int] = {}
    rows = []
    for group in layout.groups:
        for site, start in zip(group.sites, group.first_components, strict=True):
            path = layout.spec.sites[site].path
            block = ".".join(path.split(".")[:4])
            projection = re.sub(r"\.\d+", "", path.split(".", 4)[-1])
            rows.append(
                (
                    site,
                    blocks.setdefault(block, len(blocks)),
                    projections.setdefault(projection, len(projections)),
                    SIDES.index(group.side),
                    start // layout.components,
                )
            )
    table = np.asarray(rows, np.int32)
    return dict(zip(("site", "block", "projection", "side", "component"), table.T, strict=True))


def assemble(layout: TokenLayout, outputs: list[Array]) -> Params:
    """Tokens → LoRA tree.

    Args:
        outputs: one array `[l, n, components, width]` per group of the layout.

    Returns:
        LoRA tree with leading axis l (`lora/factors.py`).
    """
    rows: dict[tuple[int, str], list[tuple[int, Array]]] = defaultdict(list)
    for group, output in zip(layout.groups, outputs, strict=True):
        # Split at once: the gradient of n slices is a sum of n padded arrays, of a split one array.
        tokens = jnp.split(output, len(group.sites), axis=1)
        for site, start, token in zip(group.sites, group.first_components, tokens, strict=True):
            rows[site, group.side].append((start, token[:, 0]))
    tree: dict = {}
    for index, site in enumerate(layout.spec.sites):
        node = tree
        for name in module_path(site.path):
            node = node.setdefault(name, {})
        for side in SIDES:
            parts = [part for _, part in sorted(rows[index, side], key=lambda item: item[0])]
            matrix = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)  # [l, r, w]
            node[side] = _to_factor(matrix, site, side)
    return tree


def disassemble(layout: TokenLayout, lora: Params) -> list[Array]:
    """LoRA tree with leading axis l → one array `[l, n, components, width]` per group; exact
    inverse of `assemble`."""
    outputs = []
    for group in layout.groups:
        parts = []
        for index, start in zip(group.sites, group.first_components, strict=True):
            site = layout.spec.sites[index]
            node = lora
            for name in module_path(site.path):
                node = node[name]
            matrix = _from_factor(node[group.side], site, group.side)
            parts.append(matrix[:, start : start + layout.components])
        outputs.append(jnp.stack(parts, axis=1))
    return outputs


def _to_factor(matrix: Array, site: LoraSite, side: str) -> Array:
    """[l, r, width] → the factor's shape; the down side stores its rank last."""
    if side == "up":
        return matrix
    factor = jnp.swapaxes(matrix, 1, 2)
    if site.kind == "conv":
        shape = (matrix.shape[0], *site.kernel_size, site.in_features, site.rank)
        return factor.reshape(shape)
    return factor


def _from_factor(factor: Array, site: LoraSite, side: str) -> Array:
    """The factor → [l, r, width]."""
    if side == "up":
        return factor
    return jnp.swapaxes(factor.reshape(factor.shape[0], -1, site.rank), 1, 2)


HEADS = ("dense", "per_token", "basis", "orthogonal")


class Head(nn.Module):
    """Writes one group of the layout."""

    group: TokenGroup
    components: int
    kind: str = "dense"
    basis_size: int = 64
    dtype: DType = jnp.float32
    zero: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "l n c"]) -> Float[Array, "l n r w"]:
        """Token states of the group → `[l, n, components, width]` in float32."""
        if self.kind not in HEADS:
            raise ValueError(f"Got: head={self.kind!r}, expected one of {HEADS}")
        num_loras, num_tokens, features = x.shape
        size = self.components * self.group.width
        start = nn.initializers.zeros if self.zero else _fan_in_normal
        if self.kind == "dense":
            out = nn.Dense(size, dtype=self.dtype, kernel_init=start, name="dense")(x)
        elif self.kind == "per_token":
            kernel = self.param("kernel", start, (num_tokens, features, size))
            out = jnp.einsum("lnc,ncw->lnw", x, kernel.astype(self.dtype))
        elif self.kind == "basis":
            basis = self.param("basis", _fan_in_normal, (num_tokens, self.basis_size, size))
            mix = nn.Dense(self.basis_size, dtype=self.dtype, kernel_init=start, name="mix")(x)
            out = jnp.einsum("lnk,nkw->lnw", mix, basis.astype(self.dtype))
        else:
            count = min(self.basis_size, self.group.width)
            mix = nn.Dense(
                self.components * count, dtype=self.dtype, kernel_init=start, name="mix"
            )(x)
            mix = mix.reshape(num_loras, num_tokens, self.components, count)
            out = jnp.einsum("lnrk,kw->lnrw", mix, frozen_basis(count, self.group.width))
        shape = (num_loras, num_tokens, self.components, self.group.width)
        return out.reshape(shape).astype(jnp.float32)


@functools.cache
def frozen_basis(count: int, width: int) -> Float[np.ndarray, "k w"]:
    """`count` orthonormal directions of a `width`-dimensional space, the same in every run.

    The seed is a constant: the basis is part of the architecture and is never stored. It is
    computed once, while a program is traced, which then holds it as a constant.
    """
    with jax.ensure_compile_time_eval():
        key = jax.random.key(2307_06949)
        return np.asarray(jax.nn.initializers.orthogonal()(key, (count, width)))


def _fan_in_normal(key, shape, dtype=jnp.float32):
    """Normal with variance 1/fan-in, fan-in being the last but one axis."""
    return jax.random.normal(key, shape, dtype) / shape[-2] ** 0.5
