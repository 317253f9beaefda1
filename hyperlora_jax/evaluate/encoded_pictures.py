"""Embeddings of many pictures: in batches of one size, so that one program serves all, shared out
over processes, and kept by content, as a foreign encoder can take a tenth of a second for each."""

import hashlib

import numpy as np
from etils import epath
from tqdm import tqdm

from hyperlora_jax.array_types import Float
from hyperlora_jax.evaluate.sample_cache import kept
from hyperlora_jax.hypernet.conditioning import ImageEncoder
from hyperlora_jax.parallel import multihost, shared_work

BATCH = 64


def pooled_embeddings(
    encoder: ImageEncoder,
    pictures: Float[np.ndarray, "n h w 3"],
    folder: epath.PathLike | None = None,
    title: str = "encoding pictures",
) -> Float[np.ndarray, "n e"]:
    """The encoder's pooled output.

    Args:
        encoder: any.
        pictures: in [0, 1].
        folder: where embeddings are kept for the next time; None keeps none.
        title: of the progress bar.
    """
    pictures = np.ascontiguousarray(pictures, np.float32)
    if folder is None:
        return _encode(encoder, pictures, title)
    digest = hashlib.sha256(f"{encoder.hash} {pictures.shape}".encode())
    digest.update(pictures.tobytes())
    return kept(folder, digest.hexdigest(), lambda: _encode(encoder, pictures, title))


def _encode(encoder: ImageEncoder, pictures: np.ndarray, title: str) -> np.ndarray:
    return shared_work.shared_rows(
        len(pictures), lambda rows: _encode_here(encoder, pictures[rows], title)
    )


def _encode_here(encoder: ImageEncoder, pictures: np.ndarray, title: str) -> np.ndarray:
    starts = range(0, len(pictures), BATCH)
    filler = np.zeros((-len(pictures) % BATCH, *pictures.shape[1:]), np.float32)
    padded = np.concatenate([pictures, filler])
    parts = [
        np.asarray(encoder.encode(padded[start : start + BATCH])[0], np.float32)
        for start in tqdm(
            starts, desc=title, unit="batch", leave=False, disable=not multihost.is_first()
        )
    ]
    return np.concatenate(parts)[: len(pictures)]
