"""The scheduler of distillation: hands concepts to slots, advances them, collects what is done.

    for concept in fit_loras(…):  save(concept.index, concept.lora)

The program is compiled once. A finished slot takes the next concept at the next chunk boundary;
while there is nothing left to hand out, it rests. The state of unfinished slots can be saved at
every boundary and restored, so that a killed run loses at most the steps since the last save.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from hyperlora_jax.array_types import Float, Params
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.parametrisations import Parametrisation, one_lora
from hyperlora_jax.distill.slots import Recipe, Slots
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec

ConceptArrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FittedLora:
    """One finished LoRA: number of its concept, folded factors (numpy), loss of every step [t]."""

    index: int
    lora: Params
    losses: Float[np.ndarray, " t"]


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
    progress: str | None = "distill",
    parametrisation: Parametrisation | None = None,
    start: Callable[[int], Params] | None = None,
    shared: Params | None = None,
) -> Iterator[FittedLora]:
    """Fits one LoRA per concept, `num_slots` at a time, and yields them as they finish.

    Args:
        concepts: numbers of the concepts to fit; the number fixes a concept's randomness.
        load: number → (latents [m, h, w, c], text states [m, n, e]), m images of the concept.
        steps_per_call: optimiser steps between two looks at the slots; it must divide the recipe's
            num_steps, so that no slot rests inside a call.
        state_file: where unfinished slots are kept for a restart; removed at the end.
        progress: title of the progress bar, None for none.
        parametrisation: what is trained; None is the LoRA's factors, as the recipe says.
        start: number → the concept's own start LoRA, where the parametrisation wants one.
        shared: what the parametrisation reads for all concepts alike.

    Raises:
        UserError: steps_per_call does not divide num_steps, a concept without images, slots that
            the mesh cannot share out evenly, a state file of another run.
    """
    steps_per_call = min(steps_per_call, recipe.num_steps)
    if recipe.num_steps % steps_per_call:
        raise UserError(
            f"distill.num_steps: got {recipe.num_steps}, expected a multiple of "
            f"steps_per_call = {steps_per_call}"
        )
    num_slots = min(num_slots, len(concepts)) if mesh is None else num_slots
    if not concepts:
        return
    trained = recipe.factors(spec) if parametrisation is None else parametrisation
    run = _Run(trained, recipe, list(concepts), load, start, num_slots, seed, state_file)
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
            unet=unet,
            schedule=schedule,
            recipe=recipe,
            parametrisation=trained,
            num_steps=steps_per_call,
        )
        losses = np.asarray(losses)
        if not np.isfinite(losses).all():
            bad = [run.owners[s] for s in np.flatnonzero(~np.isfinite(losses).all(axis=0))]
            raise UserError(
                f"distill: the loss of concepts {bad} is not finite; lower learning_rate"
            )
        bar.set_postfix_str(f"loss {losses[losses > 0].mean():.4f}")
        bar.update(steps_per_call * len(run.busy))
        run.record(losses)
        for slot in run.finished(np.asarray(slots.step)):
            yield run.take(slots, slot, shared)
            slots = run.hand_over(slots, slot)
        since_save += steps_per_call
        if state_file and since_save >= save_every_steps and run.busy:
            run.save(slots)
            since_save = 0
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


class _Run:
    """Which slot works on which concept, and what is left."""

    def __init__(self, trained, recipe, concepts, load, start, num_slots, seed, state_file):
        self.trained, self.recipe, self.load, self.start = trained, recipe, load, start
        self.seed, self.num_slots, self.state_file = seed, num_slots, state_file
        self.waiting: list[int] = list(concepts)
        self.owners: list[int | None] = [None] * num_slots
        self.curves: dict[int, list[np.ndarray]] = {}

    @property
    def busy(self) -> list[int]:
        """Slots that are at work."""
        return [slot for slot, owner in enumerate(self.owners) if owner is not None]

    def begin(self) -> Slots:
        """Restored slots, or new ones with the first concepts handed out."""
        latents, text = self.load(self.waiting[0])
        start = None if self.start is None else self.start(self.waiting[0])
        slots = slot_state.empty_slots(
            self.trained, self.recipe, self.num_slots, latents.shape, text.shape, start
        )
        if self.state_file and self.state_file.exists():
            return self._restore(slots)
        for slot in range(self.num_slots):
            slots = self.hand_over(slots, slot)
        return slots

    def hand_over(self, slots: Slots, slot: int) -> Slots:
        """Gives the slot the next waiting concept, or lets it rest."""
        self.owners[slot] = None
        if not self.waiting:
            return slots
        concept = self.waiting.pop(0)
        self.owners[slot] = concept
        self.curves[concept] = []
        return self._fill(slots, slot, concept)

    def _fill(self, slots: Slots, slot: int, concept: int) -> Slots:
        latents, text = self.load(concept)
        if len(latents) == 0:
            raise UserError(f"distill: concept {concept} has no images, expected at least one")
        room = slots.latents.shape[1]
        if len(latents) > room:
            latents, text = latents[:room], text[:room]
        missing = [(0, room - len(latents))]
        return slot_state.load_slot(
            slots,
            jnp.asarray(slot),
            slot_state.concept_key(self.seed, concept),
            jnp.asarray(np.pad(latents, missing + [(0, 0)] * 3), jnp.float32),
            jnp.asarray(np.pad(text, missing + [(0, 0)] * 2), jnp.float32),
            jnp.asarray(len(latents), jnp.int32),
            None if self.start is None else self.start(concept),
            parametrisation=self.trained,
            recipe=self.recipe,
        )

    def record(self, losses: np.ndarray) -> None:
        """Appends a chunk of the loss curves [t, s]."""
        for slot in self.busy:
            self.curves[self.owners[slot]].append(losses[:, slot])

    def finished(self, steps: np.ndarray) -> list[int]:
        """Busy slots that reached the step budget."""
        return [slot for slot in self.busy if steps[slot] >= self.recipe.num_steps]

    def take(self, slots: Slots, slot: int, shared: Params | None) -> FittedLora:
        """The finished LoRA of a slot."""
        concept = self.owners[slot]
        lora = one_lora(self.trained, slots.params, slots.start, shared, slot)
        return FittedLora(concept, lora, np.concatenate(self.curves.pop(concept)))

    def steps_done(self, slots: Slots) -> int:
        """Steps that restored slots already made."""
        steps = np.asarray(slots.step)
        return int(sum(steps[slot] for slot in self.busy))

    def save(self, slots: Slots) -> None:
        """Writes the unfinished slots, without their images, in one atomic file."""
        tree = serialization.to_state_dict(_without_inputs(slots))
        flat = traverse_util.flatten_dict(tree, sep="/", keep_empty_nodes=True)
        arrays = {k: np.ascontiguousarray(v) for k, v in flat.items() if hasattr(v, "shape")}
        for slot in self.busy:
            curve = self.curves[self.owners[slot]]
            arrays[f"curve/{slot}"] = np.concatenate(curve) if curve else np.zeros(0, np.float32)
        temporary = self.state_file.with_suffix(".tmp")
        save_file(
            arrays, temporary, metadata={"run": self._facts(), "owners": json.dumps(self.owners)}
        )
        temporary.replace(self.state_file)

    def _restore(self, slots: Slots) -> Slots:
        from safetensors import safe_open

        with safe_open(self.state_file, "np") as file:
            metadata = file.metadata()
        if metadata.get("run") != self._facts():
            raise UserError(
                f"{self.state_file}: belongs to another run ({metadata.get('run')}), "
                f"this one is {self._facts()}; remove it or take another workdir"
            )
        arrays = load_file(self.state_file)
        empty = _without_inputs(slots)
        tree = serialization.to_state_dict(empty)
        flat = traverse_util.flatten_dict(tree, sep="/", keep_empty_nodes=True)
        filled = {k: jnp.asarray(arrays[k]) if k in arrays else v for k, v in flat.items()}
        state = serialization.from_state_dict(empty, traverse_util.unflatten_dict(filled, sep="/"))
        for slot, concept in enumerate(json.loads(metadata["owners"])):
            if concept is None or concept not in self.waiting:
                continue  # finished and written after this state was saved
            slots = self._fill(slots, slot, concept)
            self.owners[slot] = concept
            self.waiting.remove(concept)
            self.curves[concept] = [arrays[f"curve/{slot}"]]
        slots = state.replace(
            latents=slots.latents,
            text_states=slots.text_states,
            count=slots.count,
            start=slots.start,
        )
        for slot, owner in enumerate(self.owners):
            if owner is None:
                slots = self.hand_over(slots, slot)
        return slots

    def _facts(self) -> str:
        recipe = dataclasses.asdict(self.recipe)
        facts = {"spec": self.trained.spec.fingerprint, "recipe": recipe, "seed": self.seed}
        trained = type(self.trained).__name__
        return json.dumps({**facts, "slots": self.num_slots, "trained": trained}, sort_keys=True)


def _without_inputs(slots: Slots) -> Slots:
    """What a restart cannot load again."""
    return slots.replace(latents=(), text_states=(), count=(), start=())
