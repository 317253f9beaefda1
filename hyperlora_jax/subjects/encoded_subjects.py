"""Subjects as the hypernetwork's training needs them: latents, text states, condition embeddings.

Everything that the frozen models make of a picture or a caption is computed once, in batches on the
accelerator, and kept.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from hyperlora_jax.array_types import AnyArray, ArrayTree, Float, Int, UInt8
from hyperlora_jax.batches import ragged
from hyperlora_jax.batches.ragged import Ragged
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.parallel.sharding import split_rows
from hyperlora_jax.stable_diffusion import prompt_embeddings
from hyperlora_jax.stable_diffusion.model import StableDiffusion

AT_ONCE = 256  # pictures or captions of `encode_subjects`
Encode = Callable[
    [ArrayTree], Mapping[str, AnyArray]
]  # b pictures or texts -> arrays [b, ...] by name


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSubjects:
    """N subjects with their references and their targets, of each its own number.

    Attributes:
        ids: their names.
        references: "pooled" [p] and "tokens" [m, p] of every picture to tell a subject by.
        targets: "latents" [h, w, c] and "text", the embeddings of its caption
            (`stable_diffusion/prompt_embeddings.py`), of every picture to reproduce.

    What nobody asked for is None, or not among the arrays.
    """

    ids: tuple[str, ...]
    references: Ragged | None = None
    targets: Ragged | None = None

    def concept(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(latents [v, h, w, c], embeddings of the captions, v rows) of one subject, float32."""
        assert self.targets is not None
        own = jax.tree.map(lambda rows: np.asarray(rows, np.float32), self.targets.of(index))
        return own["latents"], own["text"]


def in_batches(
    encode: Callable[[ArrayTree], ArrayTree],
    items: Iterable[ArrayTree],
    count: int,
    batch_size: int,
    title: str | None,
    whole: bool = False,
) -> Iterator[ArrayTree]:
    """`encode` of `count` arrays or texts, batch by batch, as trees of numpy arrays.

    The last batch is filled up with its last item, so that one program serves all of them, and cut
    again. With `whole` that holds for the only batch of fewer items, too.
    """
    batch_size = batch_size if whole else min(batch_size, count)
    rest = iter(items)
    starts = range(0, count, batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=title is None):
        own = list(itertools.islice(rest, min(batch_size, count - start)))
        filled = [*own, *[own[-1]] * (batch_size - len(own))]
        given = filled if isinstance(own[0], str) else np.stack(filled)
        encoded = jax.device_get(encode(given))
        yield jax.tree.map(lambda rows, own=own: np.asarray(rows)[: len(own)], encoded)


def encode_in_batches(
    function: Callable[[ArrayTree], ArrayTree],
    items: Sequence[str] | AnyArray | Sequence[AnyArray],
    batch_size: int,
    title: str | None = None,
    whole: bool = False,
) -> ArrayTree:
    """function over slices of `items` (array or list), results as numpy arrays, concatenated."""
    parts = list(in_batches(function, items, len(items), batch_size, title, whole))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def encode_subjects(
    sd: StableDiffusion,
    ids: Sequence[str],
    images: Sequence[UInt8[np.ndarray, "_ h w 3"]] | UInt8[np.ndarray, "n v h w 3"],
    captions: Sequence[Sequence[str]],
) -> EncodedSubjects:
    """Targets: what autoencoder and text encoder make of all pictures and captions.

    Args:
        images: of every subject its own number, all of one size.
        captions: captions[n][v] of picture [n, v].
    """
    unique, index = number_captions(captions)
    size = (int(images[0].shape[1]), int(images[0].shape[2]))

    def run(encode: Encode, items: Sequence[str] | np.ndarray) -> dict[str, np.ndarray]:
        encoded = encode_in_batches(encode, items, AT_ONCE)
        return {name: np.asarray(rows, np.float32) for name, rows in encoded.items()}

    latents = run(latents_by(sd), np.concatenate(list(images)))
    texts = ragged.shared(index, run(texts_by(sd, size), unique))
    offsets = ragged.offsets_of([len(own) for own in images])
    return EncodedSubjects(tuple(ids), None, Ragged(offsets, {**latents, "text": texts}))


def number_captions(
    captions: Sequence[Sequence[str]],
) -> tuple[list[str], Int[np.ndarray, " rows"]]:
    """(every different caption once, in the order of the alphabet; the number of every picture's,
    subject after subject)."""
    unique = sorted({caption for row in captions for caption in row})
    number = {caption: k for k, caption in enumerate(unique)}
    return unique, np.asarray([number[text] for row in captions for text in row], np.int32)


def texts_by(sd: StableDiffusion, picture: tuple[int, int]) -> Encode:
    """Captions of pictures (height, width) -> their embeddings."""
    return lambda texts: prompt_embeddings.encode(sd, texts, picture)


def latents_by(sd: StableDiffusion, mesh: Mesh | None = None) -> Encode:
    """Pictures -> "latents" [b, h, w, c], split over a mesh that `sd` lies on too."""
    return lambda images: {"latents": sd.encode_images(_unit_pixels(images, mesh))}


def references_by(encoder: ImageEncoder, mesh: Mesh | None = None) -> Encode:
    """Pictures -> "pooled" [b, p] and "tokens" [b, m, p]."""

    def encode(images: UInt8[np.ndarray, "b h w 3"]) -> dict[str, AnyArray]:
        pooled, tokens = encoder.encode(_unit_pixels(images, mesh))
        return {"pooled": pooled, "tokens": tokens}

    return encode


def _unit_pixels(
    images: UInt8[np.ndarray, "b h w 3"], mesh: Mesh | None
) -> Float[jax.Array, "b h w 3"]:
    return split_rows(jnp.asarray(images, jnp.float32) / 255.0, mesh)
