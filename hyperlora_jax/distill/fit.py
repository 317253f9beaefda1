"""The scheduler of distillation: hands concepts to slots, advances them, collects what is done.

    for concept in fit_loras(…):  save(concept.index, concept.lora)

The program is compiled once. A finished slot takes the next concept at the next chunk boundary;
while there is nothing left to hand out, it rests. The state of unfinished slots can be saved at
every boundary and restored, so that a killed run loses at most the steps since the last save.

`SlotRun` knows which slot works on which concept, and what is left.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from hyperlora_jax import facts
from hyperlora_jax.array_types import AnyArray, ArrayTree, Float, Params
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.parametrisations import Parametrisation, one_lora
from hyperlora_jax.distill.slots import ConceptArrays, Recipe, Slots
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.parallel import sharding
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser
from hyperlora_jax.stable_diffusion.networks.unet import UNet
from hyperlora_jax.stable_diffusion.prompt_embeddings import Text


@dataclasses.dataclass(frozen=True)
class FittedLora:
    """One finished LoRA: number of its concept, folded factors (numpy), loss of every step [t]."""

    index: int
    lora: Params
    losses: Float[np.ndarray, " t"]


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """The frozen model that LoRAs are fitted on."""

    unet: UNet
    params: Params
    schedule: NoiseSchedule


@dataclasses.dataclass(frozen=True, eq=False)
class Concepts:
    """What is to be fitted.

    Attributes:
        numbers: of the concepts; the number fixes a concept's randomness.
        load: number → (latents [m, h, w, c], prompt embeddings), m images of the concept.
        start: number → the concept's own start LoRA, where the parametrisation wants one.
        max_images: room for a concept's images in a slot; None is as many as the first has.
        name: number → what tells a concept and its pictures from others in the state file.
        reject: called with the number of a concept that cannot be fitted (a loss, a LoRA or an
            input that is not finite) and the reason; the others go on. None: that is an error.
    """

    numbers: Sequence[int]
    load: Callable[[int], ConceptArrays]
    start: Callable[[int], Params] | None = None
    max_images: int | None = None
    name: Callable[[int], str] = str
    reject: Callable[[int, str], None] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How the fits share the machine.

    Attributes:
        steps_per_call: optimiser steps between two looks at the slots; it must divide the recipe's
            num_steps, so that no slot rests inside a call.
        mesh: over whose axes the slots are spread.
        state_file: where unfinished slots are kept for a restart; removed at the end.
        on_save: called when the state file was written.
        progress: title of the progress bar, None for none.
    """

    num_slots: int = 16
    steps_per_call: int = 25
    seed: int = 0
    mesh: Mesh | None = None
    state_file: Path | None = None
    save_every_steps: int = 200
    on_save: Callable[[], None] | None = None
    progress: str | None = "distill"


class SlotRun:
    """Which slot works on which concept, and what is left."""

    def __init__(self, trained: Parametrisation, recipe: Recipe, concepts: Concepts, plan: Plan):
        self.trained, self.recipe, self.concepts, self.plan = trained, recipe, concepts, plan
        self.waiting: list[int] = list(concepts.numbers)
        self.owners: list[int | None] = [None] * plan.num_slots
        self.curves: dict[int, list[np.ndarray]] = {}

    @property
    def busy(self) -> dict[int, int]:
        """The concepts by the slots that are at work on them."""
        return {slot: owner for slot, owner in enumerate(self.owners) if owner is not None}

    def begin(self) -> Slots:
        """Restored slots, or new ones with the first concepts handed out."""
        slots = self._resting()
        if self.plan.state_file and self.plan.state_file.exists():
            return self._restore(slots, self.plan.state_file)
        for slot in range(self.plan.num_slots):
            slots = self.hand_over(slots, slot)
        return slots

    def _resting(self) -> Slots:
        """Slots without work, made where they belong: spread over every axis of the mesh."""
        first, num_slots, mesh = self.waiting[0], self.plan.num_slots, self.plan.mesh
        concept, start = self.concepts.load(first), self._start(first)
        room = self.concepts.max_images or len(concept[0])

        def make() -> Slots:
            return slot_state.empty_slots(
                self.trained, self.recipe, num_slots, concept, room, start
            )

        return make() if mesh is None else jax.jit(make, out_shardings=spread(mesh, num_slots))()

    def _start(self, concept: int) -> Params | None:
        return None if self.concepts.start is None else self.concepts.start(concept)

    def hand_over(self, slots: Slots, slot: int) -> Slots:
        """Gives the slot the next waiting concept that can be fitted, or lets it rest."""
        self.owners[slot] = None
        while self.waiting:
            concept = self.waiting.pop(0)
            arrays = self.concepts.load(concept)
            if unusable := _unusable(*arrays):
                self.reject(concept, unusable)
                continue
            self.owners[slot] = concept
            self.curves[concept] = []
            return self._fill(slots, slot, concept, arrays)
        return slots

    def reject(self, concept: int, reason: str) -> None:
        """Gives a concept up.

        Raises:
            UserError: nobody wants to hear of it.
        """
        self.curves.pop(concept, None)
        if self.concepts.reject is None:
            raise UserError(f"distill: concept {self.concepts.name(concept)}: {reason}")
        self.concepts.reject(concept, reason)

    def _fill(self, slots: Slots, slot: int, concept: int, arrays: ConceptArrays) -> Slots:
        count, room = len(arrays[0]), slots.latents.shape[1]
        if not 1 <= count <= room:
            raise UserError(f"distill: concept {concept} has {count} images, expected 1 to {room}")
        return slot_state.load_slot(
            slots,
            jnp.asarray(slot),
            slot_state.concept_key(self.plan.seed, concept),
            jax.tree.map(jnp.asarray, slot_state.in_room(arrays, room)),
            jnp.asarray(count, jnp.int32),
            self._start(concept),
            parametrisation=self.trained,
            recipe=self.recipe,
        )

    def record(self, losses: np.ndarray) -> None:
        """Appends a chunk of the loss curves [t, s]."""
        for slot, concept in self.busy.items():
            self.curves[concept].append(losses[:, slot])

    def finished(self, steps: np.ndarray) -> list[int]:
        """Busy slots that reached the step budget or a plateau."""
        return [
            slot
            for slot, concept in self.busy.items()
            if steps[slot] >= self.recipe.num_steps or on_plateau(self.curves[concept], self.recipe)
        ]

    def diverged(self, losses: np.ndarray) -> dict[int, str]:
        """{slot: reason} of busy slots whose losses [t, s] of the last steps are not finite."""
        reasons = {}
        for slot, concept in self.busy.items():
            bad = np.flatnonzero(~np.isfinite(losses[:, slot]))
            if len(bad):
                done = sum(map(len, self.curves[concept])) - len(losses)
                step = done + int(bad[0]) + 1
                reasons[slot] = f"its loss is not finite at step {step} of {self.recipe.num_steps}"
        return reasons

    def take(self, slots: Slots, slot: int, shared: Params | None) -> FittedLora | None:
        """The finished LoRA of a slot; None where it has numbers that are not finite."""
        concept = self.busy[slot]
        lora = one_lora(self.trained, slots.params, slots.start, shared, slot)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lora)):
            self.reject(concept, "its LoRA is not finite after the last step")
            return None
        # A slot that was restored may have reached its last step inside a call, and rested.
        losses = np.concatenate(self.curves.pop(concept))[: self.recipe.num_steps]
        return FittedLora(concept, lora, losses)

    def steps_done(self, slots: Slots) -> int:
        """Steps that restored slots already made."""
        steps = np.asarray(slots.step)
        return int(sum(steps[slot] for slot in self.busy))

    def save(self, slots: Slots, file: Path) -> None:
        """Writes the unfinished slots, without their images, in one atomic file."""
        tree = serialization.to_state_dict(_without_inputs(slots))
        flat = traverse_util.flatten_dict(tree, sep="/", keep_empty_nodes=True)
        arrays = {k: np.ascontiguousarray(v) for k, v in flat.items() if hasattr(v, "shape")}
        for slot, concept in self.busy.items():
            curve = self.curves[concept]
            arrays[f"curve/{slot}"] = np.concatenate(curve) if curve else np.zeros(0, np.float32)
        names = [None if owner is None else self.concepts.name(owner) for owner in self.owners]
        metadata = {"run": json.dumps(self._facts()), "owners": json.dumps(names)}
        safetensors_io.write(file, arrays, metadata)

    def _restore(self, slots: Slots, file: Path) -> Slots:
        """The slots of the state file whose concepts wait; it may be of another number of them."""
        arrays, metadata = safetensors_io.read(file)
        saved = json.loads(metadata.get("run", "{}"))
        saved.pop("slots", None)  # of a time when their number had to stay
        if differing := facts.differences(saved, self._facts()):
            raise UserError(facts.refusal(str(self.plan.state_file), differing))
        waiting = {self.concepts.name(concept): concept for concept in self.waiting}
        owners = json.loads(metadata["owners"])
        # Others were finished and written after this state was saved.
        unfinished = [
            (place, waiting[str(o)]) for place, o in enumerate(owners) if str(o) in waiting
        ]
        empty = _without_inputs(slots)
        tree = serialization.to_state_dict(empty)
        flat: Params = traverse_util.flatten_dict(tree, sep="/", keep_empty_nodes=True)
        filled: dict[str, ArrayTree] = {
            k: np.array(v) if k in arrays else v for k, v in flat.items()
        }
        for slot, (place, concept) in enumerate(unfinished[: self.plan.num_slots]):
            for name in filled.keys() & arrays.keys():
                filled[name][slot] = arrays[name][place]
            slots = self._fill(slots, slot, concept, self.concepts.load(concept))
            self.owners[slot] = concept
            self.waiting.remove(concept)
            self.curves[concept] = [arrays[f"curve/{place}"]]
        filled = {k: jnp.asarray(v) if k in arrays else v for k, v in filled.items()}
        tree = traverse_util.unflatten_dict(filled, sep="/")
        state: Slots = serialization.from_state_dict(empty, tree)  # pyright: ignore[reportAssignmentType]
        slots = dataclasses.replace(
            state,
            latents=slots.latents,
            text=slots.text,
            count=slots.count,
            start=slots.start,
        )
        for slot, owner in enumerate(self.owners):
            if owner is None:
                slots = self.hand_over(slots, slot)
        return slots

    def _facts(self) -> dict[str, object]:
        return {
            "spec": self.trained.spec.fingerprint,
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.plan.seed,
            "trained": type(self.trained).__name__,
        }


def spread(mesh: Mesh, num_slots: int) -> NamedSharding:
    """Of slots: over every axis of the mesh.

    Raises:
        UserError: their number cannot be shared out evenly.
    """
    if num_slots % mesh.size:
        raise UserError(
            f"distill.num_slots: got {num_slots}, expected a multiple of the {mesh.size} devices"
        )
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def _unusable(latents: AnyArray, text: Text) -> str:
    """Why a concept cannot be fitted; "" where it can."""
    if not all(np.isfinite(rows).all() for rows in text.values()):
        return "the text states of its captions are not finite"
    if not np.isfinite(latents).all():
        return "the latents of its pictures are not finite"
    return ""


def on_plateau(curve: Sequence[np.ndarray], recipe: Recipe) -> bool:
    """Whether the last window of a loss curve (in chunks) is no longer below the one before."""
    window = recipe.plateau_window
    if window is None or sum(map(len, curve)) < 2 * window:
        return False
    losses = np.concatenate(curve)
    before, last = losses[-2 * window : -window].mean(), losses[-window:].mean()
    return bool(last > (1 - recipe.plateau_drop) * before)


def _without_inputs(slots: Slots) -> Slots:
    """What a restart cannot load again."""
    return dataclasses.replace(slots, latents=(), text=(), count=(), start=())


__all__ = ["ConceptArrays", "FittedLora", "fit_loras"]


def fit_loras(
    base: Base,
    trained: Parametrisation,
    recipe: Recipe,
    concepts: Concepts,
    plan: Plan = Plan(),
    *,
    shared: Params | None = None,
    prior: ConceptArrays | None = None,
) -> Iterator[FittedLora]:
    """Fits one LoRA per concept, `plan.num_slots` at a time, and yields them as they finish.

    Args:
        trained: what is trained; `recipe.factors(spec)` are a LoRA's own factors.
        shared: what the parametrisation reads for all concepts alike.
        prior: (latents, prompt embeddings) of class pictures, for a recipe with a `prior_weight`.

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
    steps_per_call = min(plan.steps_per_call, recipe.num_steps)
    if recipe.num_steps % steps_per_call:
        raise UserError(
            f"distill.num_steps: got {recipe.num_steps}, expected a multiple of "
            f"steps_per_call = {steps_per_call}"
        )
    # A restart has fewer concepts left, but its state file has all slots.
    if not concepts.numbers:
        return
    count, mesh, state_file = len(concepts.numbers), plan.mesh, plan.state_file
    if state_file is None:
        devices = 1 if mesh is None else mesh.size
        plan = dataclasses.replace(
            plan, num_slots=min(plan.num_slots, -(-count // devices) * devices)
        )
    run = SlotRun(trained, recipe, concepts, plan)
    slots, unet_params = run.begin(), base.params
    if mesh is not None:
        unet_params = jax.device_put(unet_params, sharding.replicated(mesh))
    bar = tqdm(
        total=count * recipe.num_steps,
        initial=run.steps_done(slots),
        desc=plan.progress,
        unit="step",
        disable=plan.progress is None,
    )
    bar.set_postfix_str("compiling fit step…")
    since_save = 0
    while run.busy:
        slots, losses = slot_state.advance(
            slots,
            unet_params,
            shared,
            prior,
            denoiser=Denoiser(base.unet, base.schedule, recipe.min_snr_gamma),
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
            run.reject(run.busy[slot], reason)
            slots = run.hand_over(slots, slot)
        for slot in run.finished(np.asarray(slots.step)):
            fitted = run.take(slots, slot, shared)
            if fitted is not None:
                yield fitted
            slots = run.hand_over(slots, slot)
        since_save += steps_per_call
        if state_file and since_save >= plan.save_every_steps and run.busy:
            run.save(slots, state_file)
            since_save = 0
            if plan.on_save:
                plan.on_save()
    bar.close()
    if state_file:
        state_file.unlink(missing_ok=True)
