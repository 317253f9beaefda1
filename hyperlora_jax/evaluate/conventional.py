"""The conventional way, as the comparison's yardstick: pictures of one identity, and how long it
takes to fit a LoRA to them."""

import time
from typing import Any

import jax
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.data.encoded_subjects import EncodedSubjects, encode_subjects
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.parametrisations import Parametrisation
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.evaluate.questions import Questions
from hyperlora_jax.lora.sites import LoraSpec


def seconds_per_fit(
    sd: Any,
    spec: LoraSpec,
    recipe: Recipe,
    questions: Questions,
    trained: Parametrisation | None = None,
    start: Params | None = None,
) -> float:
    """Seconds of fitting one LoRA alone, compilation not counted.

    A fifth of the steps (at least 5) is timed after a first, compiling call, and scaled to the
    whole recipe.
    """
    concept = encode_views(sd, questions.first(1)).concept(0)
    count = len(concept[0])
    timed = min(recipe.num_steps, max(5, recipe.num_steps // 5))
    trained = recipe.factors(spec) if trained is None else trained
    slots = slot_state.empty_slots(trained, recipe, 1, concept, count, start)
    slots = slot_state.load_slot(
        slots,
        np.int32(0),
        slot_state.concept_key(0, 0),
        *concept,
        np.int32(count),
        start,
        parametrisation=trained,
        recipe=recipe,
    )
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        slots, losses = slot_state.advance(
            slots,
            sd.params["unet"],
            unet=sd.unet,
            schedule=sd.schedule,
            recipe=recipe,
            parametrisation=trained,
            num_steps=timed,
        )
        jax.block_until_ready(losses)
        seconds = time.perf_counter() - began
    return seconds * recipe.num_steps / timed


def encode_views(sd: Any, questions: Questions, num_views: int | None = None) -> EncodedSubjects:
    """Latents and text conditions of the first views (None: all) of every identity."""
    return encode_subjects(
        sd,
        None,
        [person.id for person in questions.identities],
        [own[:num_views] for own in questions.views],
        [captions[:num_views] for captions in questions.view_captions],
        progress=False,
    )


def most_views(encoded: EncodedSubjects) -> int:
    """Views of the identity with the most."""
    assert encoded.targets is not None
    return int(encoded.targets.counts.max())
