"""Embeddings that were computed elsewhere, looked up by the reference's name."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from hyperlora_jax.array_types import AnyArray, Float
from hyperlora_jax.errors import UserError

Pooled = Float[AnyArray, "b e"]
Tokens = Float[AnyArray, "b n e"]


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """One row per reference.

    Attributes:
      name: for messages and metadata.
      pooled: [r, e], one row per reference.
      tokens: [r, n, e]; the pooled rows themselves (n = 1) when the file holds no tokens.
      names: the references' names (a file's stem); "0", "1", ... when the file holds none.
      hash: hex sha256 of the file.
    """

    name: str
    pooled: Float[np.ndarray, "r e"]
    tokens: Float[np.ndarray, "r n e"]
    names: tuple[str, ...]
    hash: str

    @property
    def embedding_dim(self) -> int:
        """Width of the pooled embedding and of every token."""
        return self.pooled.shape[1]

    def lookup(self, names: Sequence[str]) -> tuple[Pooled, Tokens]:
        """Pooled [b, e] and tokens [b, n, e] of the named references.

        Raises:
          UserError: a name that the table does not hold.
        """
        rows = {name: row for row, name in enumerate(self.names)}
        for name in names:
            if name not in rows:
                raise UserError(
                    f"embedding table {self.name}: found no row for reference {name!r}, "
                    f"expected one of {len(rows)} names such as {self.names[:3]}"
                )
        index = [rows[name] for name in names]
        return self.pooled[index], self.tokens[index]

    def encode(self, images: Float[AnyArray, "b h w 3"]) -> tuple[Pooled, Tokens]:
        """Always raises UserError: a table cannot look at pictures, see `lookup`."""
        raise UserError(
            f"embedding table {self.name}: cannot encode {len(images)} picture(s), "
            "name references that it holds"
        )


def load_table(path: epath.PathLike) -> EmbeddingTable:
    """Embeddings from .npy ([r, e] or [r, n, e]) or .safetensors (one tensor per reference name).

    Raises:
      UserError: not such a file, other shapes, or values that are not finite.
    """
    file = epath.Path(path)
    data = file.read_bytes()
    if file.suffix == ".npy":
        rows, names = _read_npy(file), None
    else:
        rows, names = _read_safetensors(file, data)
    if rows.ndim not in (2, 3) or not len(rows) or not np.issubdtype(rows.dtype, np.floating):
        raise UserError(
            f"embedding table {path}: found {rows.dtype} of shape {rows.shape}, "
            "expected floats of shape [references, width] or [references, tokens, width]"
        )
    if not np.isfinite(rows).all():
        raise UserError(f"embedding table {path}: found values that are not finite")
    rows = rows.astype(np.float32)
    tokens = rows if rows.ndim == 3 else rows[:, None]
    names = names or tuple(str(i) for i in range(len(rows)))
    return EmbeddingTable(
        file.stem, tokens.mean(axis=1), tokens, names, hashlib.sha256(data).hexdigest()
    )


def _read_npy(file: epath.Path) -> np.ndarray:
    with file.open("rb") as stream:
        try:
            return np.load(stream, allow_pickle=False)
        except ValueError as error:
            raise UserError(f"embedding table {file}: is no .npy array of numbers") from error


def _read_safetensors(file: epath.Path, data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        flat = load(data)
    except SafetensorError as error:
        raise UserError(f"embedding table {file}: is no safetensors file ({error})") from error
    shapes = {value.shape for value in flat.values()}
    if len(shapes) != 1:
        raise UserError(
            f"embedding table {file}: found tensors of {len(shapes)} shapes, "
            "expected one tensor per reference, all of one shape"
        )
    names = tuple(sorted(flat))
    return np.stack([flat[name] for name in names]), names
