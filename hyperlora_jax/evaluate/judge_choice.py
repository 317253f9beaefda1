"""Who judges, and whether that is somebody independent.

The encoder that conditions the hypernetwork is a flattering judge of it: training taught the
hypernetwork to listen to it. It judges where no other is at hand, and whatever name it is given
under, it is told from others by what it answers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hyperlora_jax.evaluate.judges import load_clip, load_judges, unit
from hyperlora_jax.hypernet.conditioning import ImageEncoder

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


def choose_judges(section: Any, condition: ImageEncoder, size: int, *, real: bool) -> Judges:
    """The judges of a config's `evaluate` section; the first independent one is the main one.

    Without any, the CLIP of `evaluate.clip` judges, and without that the condition encoder.

    Args:
        condition: the encoder that conditions the hypernetwork.
        size: pixels of the base model's pictures.
        real: whether there are no exact pictures, so that somebody has to judge.

    Raises:
        UserError: a judge that cannot be loaded.
    """
    found = load_judges(dict(section.judges))
    if not found and not real:
        return Judges({}, frozenset(), "", "")
    if not found and section.clip:
        found = {"clip": load_clip(section.clip).vision}
    leaky = {name for name, judge in found.items() if same_encoder(judge, condition, size)}
    every = found if leaky else {OWN: condition, **found}
    independent = [name for name in found if name not in leaky]
    main = [*independent, *found, *every][0]
    return Judges(every, frozenset(leaky or {OWN}), main, _note(main, found, leaky, real))


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


def _note(main: str, found: Mapping[str, Any], leaky: set[str], real: bool) -> str:
    if real and not found:
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
