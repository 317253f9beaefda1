"""Which slot works on which concept, what is left, and how that survives a kill."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util

from hyperlora_jax import facts
from hyperlora_jax.array_types import AnyArray, Float, Params
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.parametrisations import one_lora
from hyperlora_jax.distill.slots import ConceptArrays, Recipe, Slots
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.stable_diffusion.text_conditions import Text


@dataclasses.dataclass(frozen=True)
class FittedLora:
    """One finished LoRA: number of its concept, folded factors (numpy), loss of every step [t]."""

    index: int
    lora: Params
    losses: Float[np.ndarray, " t"]


class SlotRun:
    """Which slot works on which concept, and what is left.

    Args:
        name: number of a concept → what tells it and its pictures from others in the state file;
            None where numbers do.
        reject: what becomes of a concept that cannot be fitted, (number, reason); None: an error.
    """

    def __init__(
        self,
        trained,
        recipe,
        concepts,
        load,
        start,
        num_slots,
        seed,
        state_file,
        max_images=None,
        name: Callable[[int], str] | None = None,
        reject: Callable[[int, str], None] | None = None,
    ):
        self.name, self._reject = name or str, reject
        self.trained, self.recipe, self.load, self.start = trained, recipe, load, start
        self.seed, self.num_slots, self.state_file = seed, num_slots, state_file
        self.max_images = max_images
        self.waiting: list[int] = list(concepts)
        self.owners: list[int | None] = [None] * num_slots
        self.curves: dict[int, list[np.ndarray]] = {}

    @property
    def busy(self) -> list[int]:
        """Slots that are at work."""
        return [slot for slot, owner in enumerate(self.owners) if owner is not None]

    def begin(self) -> Slots:
        """Restored slots, or new ones with the first concepts handed out."""
        concept = self.load(self.waiting[0])
        start = None if self.start is None else self.start(self.waiting[0])
        room = self.max_images or len(concept[0])
        slots = slot_state.empty_slots(
            self.trained, self.recipe, self.num_slots, concept, room, start
        )
        if self.state_file and self.state_file.exists():
            return self._restore(slots)
        for slot in range(self.num_slots):
            slots = self.hand_over(slots, slot)
        return slots

    def hand_over(self, slots: Slots, slot: int) -> Slots:
        """Gives the slot the next waiting concept that can be fitted, or lets it rest."""
        self.owners[slot] = None
        while self.waiting:
            concept = self.waiting.pop(0)
            arrays = self.load(concept)
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
        if self._reject is None:
            raise UserError(f"distill: concept {self.name(concept)}: {reason}")
        self._reject(concept, reason)

    def _fill(self, slots: Slots, slot: int, concept: int, arrays: ConceptArrays) -> Slots:
        count, room = len(arrays[0]), slots.latents.shape[1]
        if not 1 <= count <= room:
            raise UserError(f"distill: concept {concept} has {count} images, expected 1 to {room}")
        return slot_state.load_slot(
            slots,
            jnp.asarray(slot),
            slot_state.concept_key(self.seed, concept),
            *jax.tree.map(jnp.asarray, slot_state.in_room(arrays, room)),
            jnp.asarray(count, jnp.int32),
            None if self.start is None else self.start(concept),
            parametrisation=self.trained,
            recipe=self.recipe,
        )

    def record(self, losses: np.ndarray) -> None:
        """Appends a chunk of the loss curves [t, s]."""
        for slot in self.busy:
            self.curves[self.owners[slot]].append(losses[:, slot])

    def finished(self, steps: np.ndarray) -> list[int]:
        """Busy slots that reached the step budget or a plateau."""
        return [
            slot
            for slot in self.busy
            if steps[slot] >= self.recipe.num_steps
            or on_plateau(self.curves[self.owners[slot]], self.recipe)
        ]

    def diverged(self, losses: np.ndarray) -> dict[int, str]:
        """{slot: reason} of busy slots whose losses [t, s] of the last steps are not finite."""
        found = {}
        for slot in self.busy:
            bad = np.flatnonzero(~np.isfinite(losses[:, slot]))
            if len(bad):
                done = sum(map(len, self.curves[self.owners[slot]])) - len(losses)
                step = done + int(bad[0]) + 1
                found[slot] = f"its loss is not finite at step {step} of {self.recipe.num_steps}"
        return found

    def take(self, slots: Slots, slot: int, shared: Params | None) -> FittedLora | None:
        """The finished LoRA of a slot; None where it has numbers that are not finite."""
        concept = self.owners[slot]
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

    def save(self, slots: Slots) -> None:
        """Writes the unfinished slots, without their images, in one atomic file."""
        tree = serialization.to_state_dict(_without_inputs(slots))
        flat = traverse_util.flatten_dict(tree, sep="/", keep_empty_nodes=True)
        arrays = {k: np.ascontiguousarray(v) for k, v in flat.items() if hasattr(v, "shape")}
        for slot in self.busy:
            curve = self.curves[self.owners[slot]]
            arrays[f"curve/{slot}"] = np.concatenate(curve) if curve else np.zeros(0, np.float32)
        names = [None if owner is None else self.name(owner) for owner in self.owners]
        metadata = {"run": json.dumps(self._facts()), "owners": json.dumps(names)}
        safetensors_io.write(self.state_file, arrays, metadata)

    def _restore(self, slots: Slots) -> Slots:
        """The slots of the state file whose concepts wait; it may be of another number of them."""
        arrays, metadata = safetensors_io.read(self.state_file)
        saved = json.loads(metadata.get("run", "{}"))
        saved.pop("slots", None)  # of a time when their number had to stay
        if found := facts.differences(saved, self._facts()):
            raise UserError(facts.refusal(str(self.state_file), found))
        waiting = {self.name(concept): concept for concept in self.waiting}
        owners = json.loads(metadata["owners"])
        # Others were finished and written after this state was saved.
        kept = [(place, waiting[str(o)]) for place, o in enumerate(owners) if str(o) in waiting]
        empty = _without_inputs(slots)
        tree = serialization.to_state_dict(empty)
        flat = traverse_util.flatten_dict(tree, sep="/", keep_empty_nodes=True)
        filled = {k: np.array(v) if k in arrays else v for k, v in flat.items()}
        for slot, (place, concept) in enumerate(kept[: self.num_slots]):
            for name in filled.keys() & arrays.keys():
                filled[name][slot] = arrays[name][place]
            slots = self._fill(slots, slot, concept, self.load(concept))
            self.owners[slot] = concept
            self.waiting.remove(concept)
            self.curves[concept] = [arrays[f"curve/{place}"]]
        filled = {k: jnp.asarray(v) if k in arrays else v for k, v in filled.items()}
        state = serialization.from_state_dict(empty, traverse_util.unflatten_dict(filled, sep="/"))
        slots = state.replace(
            latents=slots.latents,
            text=slots.text,
            count=slots.count,
            start=slots.start,
        )
        for slot, owner in enumerate(self.owners):
            if owner is None:
                slots = self.hand_over(slots, slot)
        return slots

    def _facts(self) -> dict[str, Any]:
        return {
            "spec": self.trained.spec.fingerprint,
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "trained": type(self.trained).__name__,
        }


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
    return slots.replace(latents=(), text=(), count=(), start=())
