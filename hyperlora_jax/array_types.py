"""Array annotations used in every public signature; the tests execute them with beartype.

Dimension letters: b batch, l LoRAs, n tokens, i/o in/out features, r rank, d flat LoRA, z latent
channels, e embedding, h w c image height, width, channels.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Key, Shaped, UInt8, UInt32

if TYPE_CHECKING:
    import jax

    Array = jax.Array
    AnyArray = jax.Array | np.ndarray
    PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
DType = str | type | np.dtype  # "bfloat16", jnp.bfloat16 or np.dtype("float32")
Index = SupportsIndex | slice | np.ndarray | Sequence[int]  # of rows
Params = Mapping[str, Any]  # nested dict of arrays
ArrayTree = Any  # any pytree of arrays, of their shapes or of their shardings
Json = Mapping[str, Any]  # a JSON object: names, and what `json` makes of the values
JsonDict = dict[str, Any]  # one that may still change


@runtime_checkable
class Rows(Protocol):
    """Rows [n, …] that may lie in files: read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> "AnyArray": ...


__all__ = [
    "AnyArray",
    "Array",
    "ArrayTree",
    "Bool",
    "DType",
    "Float",
    "Index",
    "Int",
    "Json",
    "JsonDict",
    "Key",
    "PRNGKey",
    "Params",
    "Rows",
    "Shaped",
    "UInt8",
    "UInt32",
]


def __getattr__(name: str) -> Any:
    """JAX's own types, when first asked for: files of LoRAs are read without JAX."""
    if name not in ("AnyArray", "Array", "PRNGKey"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jax import Array

    types = {
        "Array": Array, "AnyArray": Array | np.ndarray,
        "PRNGKey": Key[Array, ""] | UInt32[Array, "2"],
    }  # fmt: skip
    return globals().setdefault(name, types[name])
