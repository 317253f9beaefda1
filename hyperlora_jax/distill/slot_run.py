"""Which slot works on which concept, what is left, and how that survives a kill."""

import dataclasses
import json
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file

from hyperlora_jax.array_types import Float, Params
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.parametrisations import one_lora
from hyperlora_jax.distill.slots import Recipe, Slots
from hyperlora_jax.errors import UserError

ConceptArrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FittedLora:
    """One finished LoRA: number of its concept, folded factors (numpy), loss of every step [t]."""

    index: int
    lora: Params
    losses: Float[np.ndarray, " t"]


class SlotRun:
    """Which slot works on which concept, and what is left."""

    def __init__(
        self, trained, recipe, concepts, load, start, num_slots, seed, state_file, max_images=None
    ):
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
        latents, text = self.load(self.waiting[0])
        start = None if self.start is None else self.start(self.waiting[0])
        room = self.max_images or len(latents)
        slots = slot_state.empty_slots(
            self.trained,
            self.recipe,
            self.num_slots,
            (room, *latents.shape[1:]),
            (room, *text.shape[1:]),
            start,
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
        room = slots.latents.shape[1]
        if not 1 <= len(latents) <= room:
            raise UserError(
                f"distill: concept {concept} has {len(latents)} images, expected 1 to {room}"
            )
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
        """Busy slots that reached the step budget or a plateau."""
        return [
            slot
            for slot in self.busy
            if steps[slot] >= self.recipe.num_steps
            or on_plateau(self.curves[self.owners[slot]], self.recipe)
        ]

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
    return slots.replace(latents=(), text_states=(), count=(), start=())
