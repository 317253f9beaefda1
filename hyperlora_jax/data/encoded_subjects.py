"""Subjects as the hypernetwork's training needs them: latents, text states, condition embeddings.

Everything that the frozen models make of a picture or a caption is computed once, in batches on the
accelerator, and kept as arrays.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from hyperlora_jax.array_types import Float, Int, UInt8
from hyperlora_jax.parallel.sharding import split_rows
from hyperlora_jax.stable_diffusion import packed_text


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
    unique, index = number_captions(captions)
    size = (int(images.shape[2]), int(images.shape[3]))
    title = "text states" if progress else None
    text_states = encode_texts(sd, unique, size, batch_size, title)
    title = "latents and conditions" if progress else None
    found = encode_pictures(sd, encoder, images, batch_size, title)
    return EncodedSubjects(tuple(ids), text_index=index, text_states=text_states, **found)


def number_captions(
    captions: Sequence[Sequence[str]],
) -> tuple[list[str], Int[np.ndarray, "n v"]]:
    """(every different caption once, in the order of the alphabet; which one a picture has)."""
    unique = sorted({caption for row in captions for caption in row})
    number = {caption: k for k, caption in enumerate(unique)}
    return unique, np.asarray([[number[caption] for caption in row] for row in captions], np.int32)


def encode_texts(
    sd: Any, texts: Sequence[str], picture: tuple[int, int], batch_size: int, title: str | None
) -> Float[np.ndarray, "u t e"]:
    """Packed text of captions of pictures (height, width)."""
    found = encode_in_batches(
        lambda some: packed_text.encode(sd, some, picture), texts, batch_size, title
    )
    return np.asarray(found, np.float32)


def encode_pictures(
    sd: Any,
    encoder: Any,
    images: UInt8[np.ndarray, "n v h w 3"],
    batch_size: int,
    title: str | None,
    mesh: Mesh | None = None,
) -> dict[str, Float[np.ndarray, "n v *any"]]:
    """{"latents", "pooled", "tokens"} of pictures, split over a mesh that `sd` lies on too."""
    count, views = images.shape[:2]

    def of(chunk: np.ndarray) -> tuple[Any, Any, Any]:
        pixels = split_rows(jnp.asarray(chunk, jnp.float32) / 255.0, mesh)
        latents = sd.encode_images(pixels)
        if encoder is None:
            empty = np.zeros((len(chunk), 0), np.float32)
            return latents, empty, empty[:, None]
        return latents, *encoder.encode(pixels)

    found = encode_in_batches(of, images.reshape(-1, *images.shape[2:]), batch_size, title)
    names = ("latents", "pooled", "tokens")
    return {
        name: np.asarray(rows, np.float32).reshape(count, views, *rows.shape[1:])
        for name, rows in zip(names, found, strict=True)
    }
