"""The scheduler of distillation: hands concepts to slots, advances them, collects what is done.

    for concept in fit_loras(…):  save(concept.index, concept.lora)

The program is compiled once. A finished slot takes the next concept at the next chunk boundary;
while there is nothing left to hand out, it rests. The state of unfinished slots can be saved at
every boundary and restored, so that a killed run loses at most the steps since the last save.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from hyperlora_jax.array_types import Params
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.parametrisations import Parametrisation
from hyperlora_jax.distill.slot_run import FittedLora, SlotRun
from hyperlora_jax.distill.slots import ConceptArrays, Recipe, Slots
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec

__all__ = ["ConceptArrays", "FittedLora", "fit_loras"]


def fit_loras(
    unet: Any,
    unet_params: Params,
    schedule: Any,
    spec: LoraSpec,
    recipe: Recipe,
    concepts: Sequence[int],
    load: Callable[[int], ConceptArrays],
    *,
    num_slots: int = 16,
    steps_per_call: int = 25,
    seed: int = 0,
    mesh: Mesh | None = None,
    state_file: Path | None = None,
    save_every_steps: int = 200,
    on_save: Callable[[], None] | None = None,
    progress: str | None = "distill",
    parametrisation: Parametrisation | None = None,
    start: Callable[[int], Params] | None = None,
    shared: Params | None = None,
    prior: ConceptArrays | None = None,
    max_images: int | None = None,
    name: Callable[[int], str] | None = None,
    reject: Callable[[int, str], None] | None = None,
) -> Iterator[FittedLora]:
    """Fits one LoRA per concept, `num_slots` at a time, and yields them as they finish.

    Args:
        concepts: numbers of the concepts to fit; the number fixes a concept's randomness.
        load: number → (latents [m, h, w, c], text conditions), m images of the concept.
        steps_per_call: optimiser steps between two looks at the slots; it must divide the recipe's
            num_steps, so that no slot rests inside a call.
        state_file: where unfinished slots are kept for a restart; removed at the end.
        on_save: called when the state file was written.
        progress: title of the progress bar, None for none.
        parametrisation: what is trained; None is the LoRA's factors, as the recipe says.
        start: number → the concept's own start LoRA, where the parametrisation wants one.
        shared: what the parametrisation reads for all concepts alike.
        prior: (latents, text conditions) of class pictures, for a recipe with a `prior_weight`.
        max_images: room for a concept's images in a slot; None is as many as the first has.
        name: number → what tells a concept and its pictures from others in the state file.
        reject: called with the number of a concept that cannot be fitted (a loss, a LoRA or an
            input that is not finite) and the reason; the others go on. None: that is an error.

    Raises:
        UserError: steps_per_call does not divide num_steps, a concept without images or with more
            than there is room for, slots that the mesh cannot share out evenly, a state file of
            another run, a recipe with a `prior_weight` but no class pictures, a concept that cannot
            be fitted.
    """
    if (recipe.prior_weight > 0) != (prior is not None):
        raise UserError(
            f"distill: prior_weight is {recipe.prior_weight} {'with' if prior else 'without'} "
            "class pictures, expected both or neither"
        )
    steps_per_call = min(steps_per_call, recipe.num_steps)
    if recipe.num_steps % steps_per_call:
        raise UserError(
            f"distill.num_steps: got {recipe.num_steps}, expected a multiple of "
            f"steps_per_call = {steps_per_call}"
        )
    # A restart has fewer concepts left, but its state file has all slots.
    if not concepts:
        return
    if state_file is None:
        devices = 1 if mesh is None else mesh.size
        num_slots = min(num_slots, -(-len(concepts) // devices) * devices)
    trained = recipe.factors(spec) if parametrisation is None else parametrisation
    run = SlotRun(
        trained, recipe, list(concepts), load, start, num_slots, seed, state_file, max_images,
        name, reject,
    )  # fmt: skip
    slots, unet_params = place(run.begin(), unet_params, mesh, num_slots)
    bar = tqdm(
        total=len(concepts) * recipe.num_steps,
        initial=run.steps_done(slots),
        desc=progress,
        unit="step",
        disable=progress is None,
    )
    bar.set_postfix_str("compiling fit step…")
    since_save = 0
    while run.busy:
        slots, losses = slot_state.advance(
            slots,
            unet_params,
            shared,
            prior,
            unet=unet,
            schedule=schedule,
            recipe=recipe,
            parametrisation=trained,
            num_steps=steps_per_call,
        )
        losses = np.asarray(losses)
        usual = losses[np.isfinite(losses) & (losses > 0)]
        bar.set_postfix_str(f"loss {usual.mean():.4f}" if len(usual) else "")
        bar.update(steps_per_call * len(run.busy))
        run.record(losses)
        for slot, reason in run.diverged(losses).items():
            run.reject(run.owners[slot], reason)
            slots = run.hand_over(slots, slot)
        for slot in run.finished(np.asarray(slots.step)):
            fitted = run.take(slots, slot, shared)
            if fitted is not None:
                yield fitted
            slots = run.hand_over(slots, slot)
        since_save += steps_per_call
        if state_file and since_save >= save_every_steps and run.busy:
            run.save(slots)
            since_save = 0
            if on_save:
                on_save()
    bar.close()
    if state_file:
        state_file.unlink(missing_ok=True)


def place(slots: Slots, unet_params: Params, mesh: Mesh | None, num_slots: int):
    """Slots over every axis of the mesh, the base on every device."""
    if mesh is None:
        return slots, unet_params
    if num_slots % mesh.size:
        raise UserError(
            f"distill.num_slots: got {num_slots}, expected a multiple of the {mesh.size} devices"
        )
    over_all = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(slots, over_all), jax.device_put(unet_params, everywhere)
