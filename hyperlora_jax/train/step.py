"""The training step: one pure function of arrays, and the one place where it is jitted."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from hyperlora_jax.array_types import Array, ArrayTree, Params, PRNGKey
from hyperlora_jax.parallel import sharding
from hyperlora_jax.train.state import TrainState

Metrics = Mapping[str, Array]
Loss = Callable[[Params, ArrayTree, Mapping[str, Array], Array], tuple[Array, Metrics]]

Step = Callable[[TrainState, ArrayTree, Mapping[str, Array], Array], tuple[TrainState, Metrics]]


def update_ema(ema: ArrayTree, params: ArrayTree, step: Array, decay: float) -> ArrayTree:
    """ema ← d·ema + (1 − d)·params with d = min(decay, (1 + step) / (10 + step)): a short memory
    at first, so that the average forgets the random start."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: (d * e + (1.0 - d) * p).astype(e.dtype), ema, params)


def train_step(
    state: TrainState,
    frozen: ArrayTree,
    batch: Mapping[str, Array],
    key: PRNGKey,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    ema_decay: float | None,
) -> tuple[TrainState, dict[str, Array]]:
    """One step on one batch. The step's key is fold_in(key, step): a restart repeats the run.

    `loss` gives (losses [b], {name: [b]}); the step takes means. Gradients are taken with respect
    to `state.params` only; `frozen` is an argument so that it is never baked into the program;
    `rate` is only reported.
    """
    step_key = jax.random.fold_in(key, state.step)

    def mean_loss(params: Params) -> tuple[Array, Metrics]:
        losses, metrics = loss(params, frozen, batch, step_key)
        return jnp.mean(losses), {name: jnp.mean(value) for name, value in metrics.items()}

    (value, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else update_ema(state.ema, params, state.step, ema_decay or 0.0)
    metrics = {
        "loss": value,
        **metrics,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, params, ema, opt_state), metrics


def jit_step(
    mesh: Mesh,
    shardings: TrainState,
    frozen_shardings: ArrayTree,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    ema_decay: float | None = None,
) -> Step:
    """`train_step` jitted over (state, frozen, batch, key)."""
    replicated: NamedSharding = sharding.replicated(mesh)

    def step(
        state: TrainState, frozen: ArrayTree, batch: Mapping[str, Array], key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        with sharding.knowing(mesh):
            return train_step(
                state, frozen, batch, key,
                loss=loss, optimizer=optimizer, rate=rate, ema_decay=ema_decay,
            )  # fmt: skip

    return jax.jit(
        step,
        in_shardings=(
            shardings,  # state: by rule
            frozen_shardings,  # frozen base: by its own rule, usually replicated
            sharding.batch_sharding(mesh),  # batch: leading axis over data × fsdp
            replicated,  # key
        ),
        out_shardings=(shardings, replicated),  # the state stays where it was; metrics are scalars
        keep_unused=True,  # the device holds them anyhow: `hyperlora compile` counts them
        donate_argnums=0,  # the old state's memory becomes the new state's; nothing else is donated
    )
