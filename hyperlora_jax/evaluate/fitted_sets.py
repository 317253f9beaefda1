"""LoRAs that are fitted to the evaluated identities themselves, kept in the workdir: conventional
ones, refined ones, and coefficients of training LoRAs.

The conventional way is the yardstick of the comparison, in scores and in seconds.
"""

import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from hyperlora_jax import storage
from hyperlora_jax.array_types import AnyArray, Float, Params
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.fit import Base, Concepts, Plan, fit_loras
from hyperlora_jax.distill.parametrisations import Added, Mixture, Parametrisation
from hyperlora_jax.distill.slots import Recipe, Slots
from hyperlora_jax.evaluate.methods import fingerprint
from hyperlora_jax.evaluate.protocol import Questions
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.parallel import multihost, shared_work
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.subjects.encoded_subjects import EncodedSubjects, encode_subjects


def seconds_per_fit(
    sd: StableDiffusion,
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
    timed = min(recipe.num_steps, max(5, recipe.num_steps // 5))
    trained = recipe.factors(spec) if trained is None else trained
    slots = loaded_slots(encode_views(sd, questions.first(1)), trained, recipe, [0], start)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        slots, losses = slot_state.advance(
            slots,
            sd.frozen_unet,
            denoiser=Denoiser(sd.unet, sd.schedule, recipe.min_snr_gamma),
            recipe=recipe,
            parametrisation=trained,
            num_steps=timed,
        )
        jax.block_until_ready(losses)
        seconds = time.perf_counter() - began
    return seconds * recipe.num_steps / timed


def encode_views(
    sd: StableDiffusion, questions: Questions, num_views: int | None = None
) -> EncodedSubjects:
    """Latents and prompt embeddings of the first views (None: all) of every identity."""
    return encode_subjects(
        sd,
        [person.id for person in questions.identities],
        [own[:num_views] for own in questions.views],
        [captions[:num_views] for captions in questions.view_captions],
    )


def loaded_slots(
    encoded: EncodedSubjects,
    trained: Parametrisation,
    recipe: Recipe,
    numbers: Iterable[int],
    start: Params | None = None,
) -> Slots:
    """A slot for each of these identities with its views, at step 0."""
    numbers, room = [*numbers], most_views(encoded)
    first = encoded.concept(0)
    slots = slot_state.empty_slots(trained, recipe, len(numbers), first, room, start)
    for slot, number in enumerate(numbers):
        concept = encoded.concept(number)
        slots = slot_state.load_slot(
            slots,
            jnp.asarray(slot),
            slot_state.concept_key(0, number),
            jax.tree.map(jnp.asarray, slot_state.in_room(concept, room)),
            jnp.asarray(len(concept[0]), jnp.int32),
            start,
            parametrisation=trained,
            recipe=recipe,
        )
    return slots


def most_views(encoded: EncodedSubjects) -> int:
    """Views of the identity with the most."""
    assert encoded.targets is not None
    return int(encoded.targets.counts.max())


@dataclasses.dataclass(frozen=True, eq=False)
class FittedSets:
    """Fits of the first identities of both sets.

    Attributes:
        folder: where finished fits are kept.
        sets: the test set and, if there is one, the validation set, cut to the identities to fit.
        recipe: of a conventional fit; `refine_recipe`, `mixture_recipe` of the others.
        refine_rank: of what refinement adds.
        mixture: `per` of `parametrisations.Mixture`.
        mesh: devices of this process to share the slots out over; processes share the identities.
    """

    folder: Path
    sd: StableDiffusion
    spec: LoraSpec
    sets: Sequence[Questions]
    recipe: Recipe
    refine_recipe: Recipe
    mixture_recipe: Recipe
    refine_rank: int
    mixture: str
    num_slots: int
    steps_per_call: int
    mesh: Mesh | None = None

    def conventional(self, num_views: int | None = None) -> dict[str, Params]:
        """{split: LoRAs} fitted to the first `num_views` views, None: all."""
        name = "conventional" if num_views is None else f"conventional_{num_views}"
        return self._kept(name, self.recipe, self.recipe.factors(self.spec), num_views)

    def refined(
        self, num_steps: int, start: Callable[[Questions], Params], depends_on: object
    ) -> dict[str, Params]:
        """{split: LoRAs} after `num_steps` on all views, from `start`."""
        recipe = dataclasses.replace(self.refine_recipe, num_steps=num_steps)
        added = recipe.factors(self.spec.with_rank(self.refine_rank))
        starts = [start(questions) for questions in self.sets]
        return self._kept(
            f"refined_{num_steps}", recipe, Added(self.spec, added), None, starts, None, depends_on
        )

    def linear_combination(
        self, vectors: Float[np.ndarray, "t d"]
    ) -> tuple[dict[str, Params], int]:
        """{split: LoRAs} that mix the training LoRAs, fitted to the reference; and the steps."""
        trained = Mixture(self.spec, len(vectors), self.mixture)
        shared = trained.arrange(vectors)
        mixtures = self._kept(
            "linear_combination", self.mixture_recipe, trained, 1, None, shared, vectors
        )
        return mixtures, self.mixture_recipe.num_steps

    def _kept(
        self,
        name: str,
        recipe: Recipe,
        trained: Parametrisation,
        num_views: int | None,
        starts: Sequence[Params] | None = None,
        shared: Params | None = None,
        depends_on: object = "",
    ) -> dict[str, Params]:
        mark = fingerprint(
            self.sd.base_hash,
            self.spec.fingerprint,
            repr((recipe, type(trained).__name__, num_views)),
            *(tuple(questions.views) for questions in self.sets),
            depends_on,
        )
        file = self.folder / f"{name}-{mark[:24]}.npz"
        splits = [questions.split for questions in self.sets]
        cached = {s: shared_work.of_first(lambda split=s: _read(file, split)) for s in splits}
        if all(vectors is not None for vectors in cached.values()):
            return {s: vectorize.unflatten(jnp.asarray(v), trained.spec) for s, v in cached.items()}
        start = None
        if starts is not None:
            singles = [
                factors.index(lora, k)
                for lora, questions in zip(starts, self.sets, strict=True)
                for k in range(questions.num_identities)
            ]
            start = singles.__getitem__
        encoded = [encode_views(self.sd, questions, num_views) for questions in self.sets]
        fitted = self._fit(name, recipe, trained, encoded, start, shared)
        if multihost.is_first():
            _write(file, {k: vectorize.flatten(v, trained.spec) for k, v in fitted.items()})
        return fitted

    def _fit(
        self,
        name: str,
        recipe: Recipe,
        trained: Parametrisation,
        encoded: Sequence[EncodedSubjects],
        start: Callable[[int], Params] | None,
        shared: Params | None,
    ) -> dict[str, Params]:
        owners = [(k, i) for k, e in enumerate(encoded) for i in range(len(e.ids))]
        most = max(map(most_views, encoded))

        def fit(rows: np.ndarray) -> Params:
            loras = self._fit_here(
                name,
                recipe,
                trained,
                Concepts(
                    sorted({*map(int, rows)}),
                    lambda number: encoded[owners[number][0]].concept(owners[number][1]),
                    start,
                    most,
                ),
                shared,
            )
            return factors.stack([loras[row] for row in rows])

        every = shared_work.shared_rows(len(owners), fit)
        return {
            questions.split: factors.index(
                every, np.array([n for n, (owner, _) in enumerate(owners) if owner == k])
            )
            for k, questions in enumerate(self.sets)
        }

    def _fit_here(
        self,
        name: str,
        recipe: Recipe,
        trained: Parametrisation,
        concepts: Concepts,
        shared: Params | None,
    ) -> dict[int, Params]:
        """The fits of some of the identities, by number."""
        fitted: dict[int, Params] = {}
        devices = 1 if self.mesh is None else self.mesh.size
        for result in fit_loras(
            Base(self.sd.unet, self.sd.frozen_unet, self.sd.schedule),
            trained,
            recipe,
            concepts,
            Plan(
                num_slots=-(-self.num_slots // devices) * devices,
                steps_per_call=math.gcd(self.steps_per_call, recipe.num_steps),
                mesh=self.mesh,
                progress=f"{name} LoRAs" if multihost.is_first() else None,
            ),
            shared=shared,
        ):
            fitted[result.index] = result.lora
        return fitted


def _read(file: Path, split: str) -> np.ndarray | None:
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        return arrays[split]


def _write(file: Path, arrays: dict[str, AnyArray]) -> None:
    """Appears whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **{name: np.asarray(array) for name, array in arrays.items()})
    storage.replaced(epath.Path(file), content.getvalue())
