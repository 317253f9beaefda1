"""The conventional way, as the comparison's yardstick: LoRAs fitted to pictures of one identity."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hyperlora_jax.array_types import Params
from hyperlora_jax.data.encoded_subjects import EncodedSubjects, encode_subjects
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.fit import fit_loras
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.evaluate.protocol import EvaluationSet
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSpec


def fit_conventional(
    sd: Any,
    spec: LoraSpec,
    recipe: Recipe,
    sets: Sequence[EvaluationSet],
    *,
    num_slots: int,
    steps_per_call: int,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> list[Params]:
    """One LoRA per identity of every set, fitted to all its views; a batch per set, on the host."""
    encoded = [_encode(sd, questions) for questions in sets]
    owners = [(k, i) for k, e in enumerate(encoded) for i in range(len(e.ids))]
    fitted: dict[int, Params] = {}
    for result in fit_loras(
        sd.unet,
        sd.params["unet"],
        sd.schedule,
        spec,
        recipe,
        range(len(owners)),
        lambda number: encoded[owners[number][0]].concept(owners[number][1]),
        num_slots=num_slots,
        steps_per_call=steps_per_call,
        seed=seed,
        mesh=mesh,
        progress="conventional LoRAs",
    ):
        fitted[result.index] = result.lora
    batches, start = [], 0
    for e in encoded:
        batches.append(
            jax.device_get(factors.stack([fitted[start + i] for i in range(len(e.ids))]))
        )
        start += len(e.ids)
    return batches


def seconds_per_fit(sd: Any, spec: LoraSpec, recipe: Recipe, questions: EvaluationSet) -> float:
    """Seconds of fitting one LoRA alone, compilation not counted.

    A fifth of the steps is timed after a first, compiling call, and scaled to the whole recipe.
    """
    latents, text = _encode(sd, questions.first(1)).concept(0)
    timed = max(1, recipe.num_steps // 5)
    trained = recipe.factors(spec)
    slots = slot_state.empty_slots(trained, recipe, 1, latents.shape, text.shape)
    slots = slot_state.load_slot(
        slots,
        np.int32(0),
        slot_state.concept_key(0, 0),
        latents,
        text,
        np.int32(len(latents)),
        parametrisation=trained,
        recipe=recipe,
    )
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
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
        seconds = time.perf_counter() - start
    return seconds * recipe.num_steps / timed


def _encode(sd: Any, questions: EvaluationSet) -> EncodedSubjects:
    return encode_subjects(
        sd,
        None,
        [person.id for person in questions.identities],
        questions.views,
        questions.view_captions,
        progress=False,
    )
