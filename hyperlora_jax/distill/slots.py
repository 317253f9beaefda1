"""Many LoRAs at once on one frozen base: the state of all slots, and the step that advances them.

S slots × G images make one UNet batch of S·G; slot s owns images s·G … s·G+G−1 and LoRA s of the
batch. The loss is a sum over slots, so that every slot gets the very gradient it would get alone;
optimiser, step count, data order and keys are per slot (vmapped), so that a LoRA does not depend on
its neighbours, on its slot, or on when it started. Slots shard over the whole mesh: no number ever
crosses from one to another.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperlora_jax.array_types import AnyArray, Array, ArrayTree, Float, Params
from hyperlora_jax.distill.parametrisations import Factors, Parametrisation
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser, lora_losses
from hyperlora_jax.stable_diffusion.prompt_embeddings import Text

ConceptArrays = tuple[AnyArray, Text]  # latents [m, h, w, c], prompt embeddings of m captions


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one conventional LoRA is fitted.

    Attributes:
        num_steps: optimiser steps per LoRA.
        images_per_step: G, drawn without repetition from the concept's images.
        learning_rate: of AdamW, constant after `warmup_steps`.
        accumulate: batches of G images whose gradients are averaged for one optimiser step.
        prior_weight: weight of the loss on class pictures (DreamBooth's prior preservation, arXiv
            2208.12242 equation 2), G of them in every batch; 0 needs no class pictures.
        plateau_window, plateau_drop: a fit ends before `num_steps` when the mean loss of its last
            `plateau_window` steps is not below that of the window before by `plateau_drop` of it;
            None never ends one early.
        alpha, init_seed: see `parametrisations.Factors`; with one initialisation for all LoRAs of a
            dataset their difference is what the data taught. Finished LoRAs are folded.
    """

    num_steps: int = 200
    images_per_step: int = 4
    accumulate: int = 1
    prior_weight: float = 0.0
    plateau_window: int | None = None
    plateau_drop: float = 0.01
    learning_rate: float = 3e-3
    warmup_steps: int = 0
    schedule: str = "constant"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    clip_norm: float | None = 1.0
    alpha: float | None = None
    min_snr_gamma: float | None = None
    init_seed: int | None = 0

    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser of one slot."""
        rate = optax.linear_schedule(
            self.learning_rate / (self.warmup_steps + 1),
            self.learning_rate,
            max(1, self.warmup_steps),
        )
        if self.schedule == "cosine":
            rest = optax.cosine_decay_schedule(
                self.learning_rate, max(1, self.num_steps - self.warmup_steps)
            )
            rate = optax.join_schedules([rate, rest], [self.warmup_steps])
        elif self.schedule != "constant":
            raise ValueError(f"Got: {self.schedule=}, expected 'constant' or 'cosine'")
        adam = optax.adamw(rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)
        if self.clip_norm is None:
            return adam
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adam)

    def factors(self, spec: LoraSpec) -> Factors:
        """What a conventional fit by this recipe trains."""
        return Factors(spec, self.alpha, self.init_seed)


@flax.struct.dataclass
class Slots:
    """State of S slots; every leaf has the leading axis s.

    `params` is what is trained and `start` what stays (see `parametrisations.py`); `count` images
    of `latents` [s, m, h, w, c] and `text` (prompt embeddings [s, m, …]) are real; `key` [s, 2]
    uint32; `step` [s] int32; a slot with `step >= num_steps` rests.
    """

    params: ArrayTree
    opt_state: ArrayTree
    step: ArrayTree
    key: ArrayTree
    latents: ArrayTree
    text: ArrayTree
    count: ArrayTree
    start: ArrayTree | None = None


def in_room(concept: ConceptArrays, room: int) -> ConceptArrays:
    """A concept's arrays, float32, filled up with zeros to so many images."""

    def padded(rows: AnyArray) -> AnyArray:
        filling = [(0, room - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
        return np.pad(np.asarray(rows, np.float32), filling)

    return jax.tree.map(padded, tuple(concept))


def concept_key(seed: int, index: int) -> Array:
    """Raw key [2] of a concept: depends on its number, never on its slot."""
    return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), index))


def empty_slots(
    parametrisation: Parametrisation,
    recipe: Recipe,
    num_slots: int,
    concept: ConceptArrays,
    room: int,
    start: Params | None = None,
) -> Slots:
    """S resting slots with room for so many images, of shapes like one concept's; `start` is one
    concept's start LoRA, where the parametrisation wants one."""

    def repeat(tree: Params) -> Params:
        return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], num_slots, 0), tree)

    def empty(rows: np.ndarray) -> Array:
        return jnp.zeros((num_slots, room, *rows.shape[1:]), jnp.float32)

    latents, text = jax.tree.map(empty, tuple(concept))

    params = repeat(parametrisation.init(jax.random.key(0)))
    return Slots(
        params=params,
        opt_state=jax.vmap(recipe.optimizer().init)(params),
        step=jnp.full((num_slots,), recipe.num_steps, jnp.int32),
        key=jnp.zeros((num_slots, 2), jnp.uint32),
        latents=latents,
        text=text,
        count=jnp.ones((num_slots,), jnp.int32),
        start=None if start is None else repeat(start),
    )


@functools.partial(jax.jit, static_argnames=("parametrisation", "recipe"), donate_argnums=0)
def load_slot(
    slots: Slots,
    index: Array,
    key: Array,
    concept: ConceptArrays,
    count: Array,
    start: Params | None = None,
    *,
    parametrisation: Parametrisation,
    recipe: Recipe,
) -> Slots:
    """Hands slot `index` to a new concept; nothing of the former one stays."""
    latents, text = concept
    params = parametrisation.init(jax.random.wrap_key_data(key))
    fresh = Slots(
        params=params,
        opt_state=recipe.optimizer().init(params),
        step=jnp.zeros((), jnp.int32),
        key=key,
        latents=latents,
        text=text,
        count=count,
        start=start,
    )
    return jax.tree.map(lambda all_, new: all_.at[index].set(new), slots, fresh)


@functools.partial(
    jax.jit,
    static_argnames=("denoiser", "recipe", "parametrisation", "num_steps"),
    donate_argnums=0,
)
def advance(
    slots: Slots,
    unet_params: Params,
    shared: Params | None = None,
    prior: ConceptArrays | None = None,
    *,
    denoiser: Denoiser,
    recipe: Recipe,
    parametrisation: Parametrisation,
    num_steps: int,
) -> tuple[Slots, Float[Array, "t s"]]:
    """`num_steps` optimiser steps of all slots that are not at rest.

    Args:
        shared: arrays that the parametrisation reads for all slots alike.
        prior: of the class pictures, for a recipe with a `prior_weight`.

    Returns:
        The slots, and the loss of every step and slot [t, s] (0 where a slot rested).
    """
    optimizer, schedule = recipe.optimizer(), denoiser.schedule
    num_slots = slots.step.shape[0]

    own = np.full(recipe.images_per_step, 1 / recipe.images_per_step, np.float32)
    weights = own if prior is None else np.concatenate([own, recipe.prior_weight * own])

    def losses(params, *batch):
        latents, text, noise, timesteps = batch
        lora, pictures = (
            parametrisation.lora(params, slots.start, shared),
            (latents, text, timesteps, noise),
        )
        sums, errors = lora_losses(denoiser, unet_params, lora, pictures, weights)
        return sums.sum(), errors[:, : recipe.images_per_step].mean(axis=1)

    def draw(slots: Slots, k: Array) -> tuple[ArrayTree, ...]:
        """Batch k of the current optimiser step, [s, g, ...] each."""
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(slots.key), slots.step)
        if recipe.accumulate > 1:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, k))(keys)
        drawn = functools.partial(_draw, recipe=recipe, schedule=schedule)
        batch = jax.vmap(drawn)(keys, slots.latents, slots.text, slots.count)
        if prior is None:
            return batch
        more = functools.partial(_draw_prior, prior=prior, recipe=recipe, schedule=schedule)
        own = jax.vmap(more)(keys)
        return jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), batch, own)

    def one_step(slots: Slots, _):
        gradient = jax.grad(losses, has_aux=True)
        if recipe.accumulate == 1:
            grads, per_slot = gradient(slots.params, *draw(slots, jnp.zeros((), jnp.int32)))
        else:

            def add(total, k):
                gradients = gradient(slots.params, *draw(slots, k))
                return jax.tree.map(jnp.add, total, gradients), None

            zero = (jax.tree.map(jnp.zeros_like, slots.params), jnp.zeros((num_slots,)))
            summed, _ = jax.lax.scan(add, zero, jnp.arange(recipe.accumulate))
            grads, per_slot = jax.tree.map(lambda leaf: leaf / recipe.accumulate, summed)
        updates, opt_state = jax.vmap(optimizer.update)(grads, slots.opt_state, slots.params)
        active = slots.step < recipe.num_steps
        params = optax.apply_updates(slots.params, updates)
        params, opt_state = _where(active, (params, opt_state), (slots.params, slots.opt_state))
        slots = dataclasses.replace(
            slots, params=params, opt_state=opt_state, step=slots.step + active.astype(jnp.int32)
        )
        return slots, jnp.where(active, per_slot, 0.0)

    return jax.lax.scan(one_step, slots, None, length=num_steps)


def _draw(key, latents, text, count, *, recipe: Recipe, schedule):
    """One slot's batch: G different images (with repetition only if there are fewer), their noise
    and timesteps."""
    order_key, time_key, noise_key = jax.random.split(key, 3)
    uniform = jax.random.uniform(order_key, (latents.shape[0],))
    order = jnp.argsort(jnp.where(jnp.arange(latents.shape[0]) < count, uniform, 2.0))
    chosen = order[jnp.arange(recipe.images_per_step) % jnp.maximum(count, 1)]
    latents, text = jax.tree.map(lambda rows: rows[chosen], (latents, text))
    timesteps = jax.random.randint(time_key, latents.shape[:1], 0, schedule.num_train_timesteps)
    noise = jax.random.normal(noise_key, latents.shape)
    return latents, text, noise, timesteps


def _draw_prior(key, *, prior, recipe: Recipe, schedule):
    """G class pictures for one slot, with repetition, their noise and timesteps."""
    order_key, time_key, noise_key = jax.random.split(jax.random.fold_in(key, 1_000_003), 3)
    chosen = jax.random.randint(order_key, (recipe.images_per_step,), 0, len(prior[0]))
    latents, text = jax.tree.map(lambda rows: rows[chosen], tuple(prior))
    timesteps = jax.random.randint(time_key, latents.shape[:1], 0, schedule.num_train_timesteps)
    return latents, text, jax.random.normal(noise_key, latents.shape), timesteps


def _where(active: Array, new: ArrayTree, old: ArrayTree) -> ArrayTree:
    def pick(a, b):
        return jnp.where(active.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)
