"""Subjects as the hypernetwork's training needs them: latents, text states, condition embeddings.

Everything that the frozen models make of a picture or a caption is computed once, in batches on the
accelerator, and kept as arrays.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hyperlora_jax.array_types import Float, Int, UInt8
from hyperlora_jax.stable_diffusion import packed_text

LAYOUT = 2  # of the kept files


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSubjects:
    """N subjects with v pictures each; every picture may serve as reference or as target.

    `text_states` holds every different caption once, packed (`stable_diffusion/packed_text.py`);
    `text_index` says which one a picture has.
    """

    ids: tuple[str, ...]
    latents: Float[np.ndarray, "n v h w c"]
    text_index: Int[np.ndarray, "n v"]
    text_states: Float[np.ndarray, "u t e"]
    pooled: Float[np.ndarray, "n v p"]
    tokens: Float[np.ndarray, "n v m p"]

    def concept(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(latents [v, h, w, c], text states [v, t, e]) of one subject."""
        return self.latents[index], self.text_states[self.text_index[index]]

    def select(self, index: Any) -> "EncodedSubjects":
        """The subjects at `index`, a slice or an array of numbers."""
        chosen = np.arange(len(self.ids))[index]
        return dataclasses.replace(
            self,
            ids=tuple(self.ids[i] for i in chosen),
            latents=self.latents[chosen],
            text_index=self.text_index[chosen],
            pooled=self.pooled[chosen],
            tokens=self.tokens[chosen],
        )


def encode_in_batches(
    function: Callable[[Any], Any], items: Any, batch_size: int, title: str | None
) -> Any:
    """function over slices of `items` (array or list), results as numpy arrays, concatenated.

    The last slice is padded to a full batch, so that one program serves all of them.
    """
    parts = []
    count = len(items)
    batch_size = min(batch_size, count)
    starts = range(0, count, batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=title is None):
        chunk = items[start : start + batch_size]
        missing = batch_size - len(chunk)
        if missing and isinstance(chunk, np.ndarray):
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        elif missing:
            chunk = [*chunk, *[chunk[-1]] * missing]
        parts.append(jax.tree.map(np.asarray, jax.device_get(function(chunk))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def encode_subjects(
    sd: Any,
    encoder: Any,
    ids: Sequence[str],
    images: UInt8[np.ndarray, "n v h w 3"],
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
    progress: bool = True,
) -> EncodedSubjects:
    """Runs autoencoder, text encoder and condition encoder over all pictures and captions.

    Args:
        sd: a StableDiffusion.
        encoder: condition encoder, or None: pooled and tokens are then empty.
        captions: captions[n][v] of picture [n, v].
    """
    count, views = images.shape[:2]
    flat = images.reshape(-1, *images.shape[2:])
    unique = sorted({caption for row in captions for caption in row})
    number = {caption: k for k, caption in enumerate(unique)}
    index = np.asarray([[number[caption] for caption in row] for row in captions], np.int32)
    picture = (int(images.shape[2]), int(images.shape[3]))
    text_states = encode_in_batches(
        lambda prompts: packed_text.encode(sd, prompts, picture),
        unique,
        batch_size,
        "text states" if progress else None,
    )

    def from_picture(chunk: np.ndarray) -> tuple[Any, Any, Any]:
        pixels = jnp.asarray(chunk, jnp.float32) / 255.0
        latents = sd.encode_images(pixels)
        if encoder is None:
            empty = jnp.zeros((len(chunk), 0))
            return latents, empty, empty[:, None]
        return latents, *encoder.encode(pixels)

    latents, pooled, tokens = encode_in_batches(
        from_picture, flat, batch_size, "latents and conditions" if progress else None
    )

    def by_subject(rows: Any) -> np.ndarray:
        return np.asarray(rows, np.float32).reshape(count, views, *rows.shape[1:])

    return EncodedSubjects(
        ids=tuple(ids),
        latents=by_subject(latents),
        text_index=index,
        text_states=np.asarray(text_states, np.float32),
        pooled=by_subject(pooled),
        tokens=by_subject(tokens),
    )


def encode_once(
    folder: Path,
    sd: Any,
    encoder: Any,
    ids: Sequence[str],
    images: UInt8[np.ndarray, "n v h w 3"],
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
) -> EncodedSubjects:
    """`encode_subjects`, kept in a file of `folder` and read again for the same pictures, captions
    and models."""
    asked = {
        "ids": list(ids),
        "pictures": hashlib.sha256(np.ascontiguousarray(images)).hexdigest(),
        "shape": images.shape,
        "captions": [list(own) for own in captions],
        "base": sd.base_hash,
        "dtype": str(jax.tree.leaves(sd.params["unet"])[0].dtype),
        "encoder": "" if encoder is None else encoder.hash,
        "layout": LAYOUT,
    }
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
    file = folder / f"encoded-{name}.npz"
    if file.exists():
        with np.load(file, allow_pickle=False) as arrays:
            stored = dict(arrays)
        return EncodedSubjects(ids=tuple(map(str, stored.pop("ids"))), **stored)
    encoded = encode_subjects(sd, encoder, ids, images, captions, batch_size=batch_size)
    arrays = {k: v for k, v in vars(encoded).items() if k != "ids"}
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, ids=np.asarray(encoded.ids), **arrays)
    temporary.replace(file)
    return encoded
