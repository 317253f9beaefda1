"""Judges that the user brings: encoders for identity and style, CLIP for prompts.

  1. encoder similarity: cosine of the embeddings of a generated and a real picture of the subject
     (identity, DINO, CLIP-I, depending on the encoder)                     `encoder_similarity`
  2. prompt similarity: cosine of CLIP's picture and text embeddings (CLIP-T) `ClipJudge.similarity`

The encoder that conditions the hypernetwork is a leaky judge of it: report it as such and beside
it one that training never saw. A picture in which a detector finds no subject, or that is not
finite, scores 0 and stays in the mean.

It judges where no other is at hand, and whatever name it is given under, it is told from others by
what it answers.
"""

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax.array_types import AnyArray, Bool, Float
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.metrics import clustered_mean, is_finite
from hyperlora_jax.evaluate.sample_cache import pooled_embeddings

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
    rows = embeddings(encoder, np.concatenate(list(pictures))[None], folder)[0]
    ends = np.cumsum([len(own) for own in pictures])
    return np.stack([own.mean(axis=0) for own in np.split(rows, ends[:-1])])


def embeddings(
    encoder: ImageEncoder,
    images: Float[AnyArray, "i c h w 3"],
    folder: epath.PathLike | None = None,
) -> Float[np.ndarray, "i c e"]:
    """Unit embeddings of pictures, clipped to [0, 1]; what is not finite counts as black.

    Args:
      folder: see `pooled_embeddings`.
    """
    pictures = np.clip(np.nan_to_num(np.asarray(images, np.float32)), 0.0, 1.0)
    flat = pictures.reshape(-1, *pictures.shape[2:])
    vectors = unit(pooled_embeddings(encoder, flat, folder, "judging"))
    return vectors.reshape(*pictures.shape[:2], -1)


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
        embedded = self.embed_texts([text for row in captions for text in row])
        theirs = embedded.reshape(len(captions), -1, embedded.shape[-1])
        ours = embeddings(self.vision, generated)
        return np.where(detected(generated, None), (ours * theirs).sum(axis=-1), 0.0)


def load_clip(clip: epath.PathLike) -> ClipJudge:
    """The CLIP model and tokenizer of a local transformers folder.

    Raises:
      UserError: torch is missing or the folder holds no CLIP model with a tokenizer.
    """
    from hyperlora_jax.encoders.foreign_encoders import load_transformers

    vision = load_transformers(clip)
    try:
        import torch
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(str(clip))
        model = transformers.CLIPModel.from_pretrained(str(clip), use_safetensors=True).eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"clip {clip}: holds no CLIP model with a tokenizer") from error
    text: Any = model.config.text_config
    length = text.max_position_embeddings

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
        detector = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"evaluate.detector: found {name!r} ({error}), expected module:function that can be "
            "imported"
        ) from error
    if not callable(detector):
        raise UserError(f"evaluate.detector: {name!r} is no function")
    return cast(Detects, detector)


def similarity_numbers(
    images: Mapping[str, Float[AnyArray, "_ c h w 3"]],
    references: RealPictures,
    judges: Mapping[str, ImageEncoder],
    *,
    leaky: Collection[str] = (),
    detects: Detects | None = None,
    folder: epath.PathLike | None = None,
) -> dict[str, object]:
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


OWN = "own"  # what the table of judges calls the condition encoder
SAME = 1e-3  # most that two numbers of unit embeddings by the same weights differ
HINT = "--config.evaluate.judges.independent=ENCODER names another"


@dataclasses.dataclass(frozen=True, eq=False)
class Judges:
    """Encoders that compare pictures.

    Attributes:
        encoders: by name, for the table of judges.
        leaky: names of those that are the condition encoder itself.
        main: whose similarity is the score where there is no exact picture; "" = nobody.
        note: what a reader must know of them; "" = nothing.
    """

    encoders: Mapping[str, ImageEncoder]
    leaky: frozenset[str]
    main: str
    note: str


def choose_judges(section: ConfigDict, encoder: ImageEncoder, size: int, *, real: bool) -> Judges:
    """The judges of a config's `evaluate` section; the first independent one is the main one.

    Without any, the CLIP of `evaluate.clip` judges, and without that the condition encoder.

    Args:
        encoder: the encoder that conditions the hypernetwork.
        size: pixels of the base model's pictures.
        real: whether there are no exact pictures, so that somebody has to judge.

    Raises:
        UserError: a judge that cannot be loaded.
    """
    given = load_judges(dict(section.judges))
    if not given and not real:
        return Judges({}, frozenset(), "", "")
    if not given and section.clip:
        given = {"clip": load_clip(section.clip).vision}
    leaky = {name for name, judge in given.items() if same_encoder(judge, encoder, size)}
    every = given if leaky else {OWN: encoder, **given}
    independent = [name for name in given if name not in leaky]
    main = [*independent, *given, *every][0]
    return Judges(every, frozenset(leaky or {OWN}), main, _note(main, given, leaky, real))


def same_encoder(one: ImageEncoder, other: ImageEncoder, size: int) -> bool:
    """Whether both are the same weights, by their hash or by their answers: a copy in another
    format or precision has another hash."""
    if one.hash == other.hash:
        return True
    if one.embedding_dim != other.embedding_dim:
        return False
    noise = np.random.default_rng(0).uniform(size=(4, size, size, 3)).astype(np.float32)
    answers = [unit(np.asarray(encoder.encode(noise)[0])) for encoder in (one, other)]
    return bool(np.abs(answers[0] - answers[1]).max() < SAME)


def _note(main: str, given: Mapping[str, object], leaky: set[str], real: bool) -> str:
    if real and not given:
        return (
            "no judge was given, so the encoder that conditions the hypernetwork judges: it is not "
            f"independent, and what it says of generated LoRAs is optimistic; {HINT}"
        )
    renamed = sorted(leaky - {OWN})
    if not renamed:
        return ""
    flattering = main in leaky and real
    return (
        f"judge {renamed[0]} is the encoder that conditions the hypernetwork (the same weights): "
        "it is not independent"
        + (", and what it says of generated LoRAs is optimistic" if flattering else "")
        + f"; {HINT}"
    )
