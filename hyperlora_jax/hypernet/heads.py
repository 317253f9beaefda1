"""Heads: token states → the numbers of the LoRA.

`dense`       one linear map per group, shared by its tokens;
`per_token`   one linear map per token, for few sites: what a site needs differs from site to site;
`basis`       coefficients of `basis_size` learned directions per token (HyperLoRA, 2503.16944);
`orthogonal`  coefficients of a frozen orthonormal basis per group (HyperDreamBooth's lightweight
              basis, arXiv 2307.06949): few numbers to predict, none of them learned here.

With `zero` a head writes zeros at first: the up side always does, so that an untrained
hypernetwork writes the base model.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Array, Float
from hyperlora_jax.hypernet.token_layout import TokenGroup

HEADS = ("dense", "per_token", "basis", "orthogonal")


class Head(nn.Module):
    """Writes one group of the layout."""

    group: TokenGroup
    components: int
    kind: str = "dense"
    basis_size: int = 64
    dtype: Any = jnp.float32
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
