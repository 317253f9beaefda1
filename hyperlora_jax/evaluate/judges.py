"""Judges that the user brings: encoders for identity and style, CLIP for prompts.

  1. encoder similarity: cosine of the embeddings of a generated and a real picture of the subject
     (identity, DINO, CLIP-I, depending on the encoder)                     `encoder_similarity`
  2. prompt similarity: cosine of CLIP's picture and text embeddings (CLIP-T) `ClipJudge.similarity`

The encoder that conditions the hypernetwork is a leaky judge of it: report it as such and beside
it one that training never saw. A picture in which a detector finds no subject, or that is not
finite, scores 0 and stays in the mean.
"""

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from hyperlora_jax.array_types import AnyArray, Bool, Float
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.encoded_pictures import pooled_embeddings
from hyperlora_jax.evaluate.metrics import clustered_mean, is_finite
from hyperlora_jax.hypernet.conditioning import ImageEncoder, load_condition_encoder

# Picture [h, w, 3] in [0, 1] -> whether it shows exactly one subject.
Detects = Callable[[np.ndarray], bool]
# Real pictures of every subject, in [0, 1]; subjects may have different numbers of them.
RealPictures = Float[AnyArray, "i r h w 3"] | Sequence[Float[np.ndarray, "_ h w 3"]]


def encoder_similarity(
    encoder: ImageEncoder,
    generated: Float[AnyArray, "i c h w 3"],
    references: RealPictures,
    detects: Detects | None = None,
    folder: epath.PathLike | None = None,
) -> Float[np.ndarray, "i c"]:
    """Equation 1, mean over a subject's real pictures; failures and undetected subjects score 0."""
    usable = detected(generated, detects)
    ours = embeddings(encoder, generated, folder)
    theirs = mean_embeddings(encoder, references, folder)
    return np.where(usable, np.einsum("ice,ie->ic", ours, theirs), 0.0)


def mean_embeddings(
    encoder: ImageEncoder, pictures: RealPictures, folder: epath.PathLike | None = None
) -> Float[np.ndarray, "i e"]:
    """Mean over every subject's pictures of their unit embeddings; see `embeddings`."""
    found = embeddings(encoder, np.concatenate(list(pictures))[None], folder)[0]
    ends = np.cumsum([len(own) for own in pictures])
    return np.stack([own.mean(axis=0) for own in np.split(found, ends[:-1])])


def embeddings(
    encoder: ImageEncoder,
    images: Float[AnyArray, "i c h w 3"],
    folder: epath.PathLike | None = None,
) -> Float[np.ndarray, "i c e"]:
    """Unit embeddings of pictures, clipped to [0, 1]; what is not finite counts as black.

    Args:
      encoder: any.
      images: any.
      folder: see `pooled_embeddings`.
    """
    pictures = np.clip(np.nan_to_num(np.asarray(images, np.float32)), 0.0, 1.0)
    flat = pictures.reshape(-1, *pictures.shape[2:])
    found = unit(pooled_embeddings(encoder, flat, folder, "judging"))
    return found.reshape(*pictures.shape[:2], -1)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipJudge:
    """A CLIP model with its tokenizer.

    Attributes:
      vision: its picture side, projected into the space shared with texts.
      embed_texts: texts -> unit embeddings [n, e].
    """

    vision: ImageEncoder
    embed_texts: Callable[[list[str]], np.ndarray]

    def similarity(
        self, generated: Float[AnyArray, "i c h w 3"], captions: Sequence[Sequence[str]]
    ) -> Float[np.ndarray, "i c"]:
        """Equation 2; failures score 0."""
        found = self.embed_texts([text for row in captions for text in row])
        theirs = found.reshape(len(captions), -1, found.shape[-1])
        ours = embeddings(self.vision, generated)
        return np.where(detected(generated, None), (ours * theirs).sum(axis=-1), 0.0)


def load_clip(clip: epath.PathLike) -> ClipJudge:
    """The CLIP model and tokenizer of a local transformers folder.

    Raises:
      UserError: torch is missing or the folder holds no CLIP model with a tokenizer.
    """
    from hyperlora_jax.hypernet.foreign_encoders import load_transformers

    vision = load_transformers(clip)
    try:
        import torch
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(str(clip))
        model = transformers.CLIPModel.from_pretrained(str(clip), use_safetensors=True).eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"clip {clip}: holds no CLIP model with a tokenizer") from error
    length = model.config.text_config.max_position_embeddings

    def embed_texts(texts: list[str]) -> np.ndarray:
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        with torch.no_grad():
            pooled = model.text_model(**tokens).pooler_output
            return unit(model.text_projection(pooled).numpy())

    return ClipJudge(vision, embed_texts)


def detected(
    generated: Float[AnyArray, "i c h w 3"], detects: Detects | None
) -> Bool[np.ndarray, "i c"]:
    """Pictures that are finite and, with a detector, show exactly one subject."""
    usable = is_finite(generated)
    if detects is None:
        return usable
    pictures = np.clip(np.nan_to_num(np.asarray(generated, np.float32)), 0.0, 1.0)
    seen = [bool(detects(pictures[at])) for at in np.ndindex(*usable.shape)]
    return usable & np.array(seen).reshape(usable.shape)


def load_judges(paths: Mapping[str, str]) -> dict[str, ImageEncoder]:
    """Encoders by name, from a config's `evaluate.judges`; names without a path are left out.

    Raises:
      UserError: no encoder there.
    """
    return {name: load_condition_encoder(path) for name, path in paths.items() if path}


def load_detector(name: str) -> Detects | None:
    """The function that a config's `evaluate.detector` names as "module:function"; "" is none.

    Raises:
      UserError: no such module or function.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"evaluate.detector: found {name!r} ({error}), expected module:function that can be "
            "imported"
        ) from error
    if not callable(found):
        raise UserError(f"evaluate.detector: {name!r} is no function")
    return found


def similarity_numbers(
    images: Mapping[str, Float[AnyArray, "_ c h w 3"]],
    references: RealPictures,
    judges: Mapping[str, ImageEncoder],
    *,
    leaky: Collection[str] = (),
    detects: Detects | None = None,
    folder: epath.PathLike | None = None,
) -> dict[str, Any]:
    """{judge: {"hash", "is_condition_encoder", "similarity": {method: estimate}}}.

    Args:
      images: pictures of the first identities, by method.
      references: real pictures of every identity.
      judges: encoders by name.
      leaky: names of those that are the encoder that conditioned the hypernetwork.
      detects: see `detected`.
      folder: see `embeddings`.
    """
    return {
        name: {
            "hash": encoder.hash,
            "is_condition_encoder": name in leaky,
            "similarity": {
                method: clustered_mean(
                    encoder_similarity(encoder, drawn, references[: len(drawn)], detects, folder)
                ).to_json()
                for method, drawn in images.items()
            },
        }
        for name, encoder in judges.items()
    }


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors along the last axis, of length 1."""
    values = np.asarray(vectors, np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
