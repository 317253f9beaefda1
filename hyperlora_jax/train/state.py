"""What training changes and checkpoints keep: step, parameters, their average, optimiser state.

No array is born on one device: shapes first (`eval_shape`), then shardings, then a jitted init.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from hyperlora_jax.array_types import Array, ArrayTree, Params, PRNGKey
from hyperlora_jax.parallel import sharding
from hyperlora_jax.train.optimizer import is_stack

INIT_STREAM = 2**32 - 1  # the step that no run reaches: its key initialises the parameters


@flax.struct.dataclass
class TrainState:
    """`step` counts finished steps, int32 []; `ema` is None or has the structure of `params`."""

    step: ArrayTree
    params: ArrayTree
    ema: ArrayTree
    opt_state: ArrayTree


def new_state(
    params: Params, optimizer: optax.GradientTransformation, with_ema: bool
) -> TrainState:
    """The state before the first step."""
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def state_shardings(shapes: TrainState, mesh: Mesh) -> TrainState:
    """Shardings for a TrainState of shapes: optimiser moments, whose paths end as those of their
    parameters do, live where these live. Muon's stacks of matrices are spread over all devices that
    divide them: each orthogonalises its own."""
    params = sharding.param_shardings(shapes.params, mesh, sharding.DEFAULT_RULES)
    replicated = sharding.replicated(mesh)

    leaves = jax.tree_util.tree_leaves_with_path(shapes.params)
    places = {
        path: (leaf.shape, place)
        for (path, leaf), place in zip(leaves, jax.tree.leaves(params), strict=True)
    }

    def like_param(path: tuple[Any, ...], leaf: ArrayTree) -> NamedSharding:
        ends = (places.get(path[start:]) for start in range(len(path)))
        shape, place = next((found for found in ends if found), (None, replicated))
        if leaf.shape != shape:
            return replicated  # factored moments differ
        stacked = jax.tree_util.DictKey("muon") in path and is_stack(path, leaf)
        return sharding.spread(leaf.shape[0], mesh) or place if stacked else place

    opt_state = jax.tree_util.tree_map_with_path(like_param, shapes.opt_state)
    ema = None if shapes.ema is None else params
    return TrainState(step=replicated, params=params, ema=ema, opt_state=opt_state)


def state_builder(
    init: Callable[[Array], ArrayTree],
    optimizer: optax.GradientTransformation,
    with_ema: bool,
) -> Callable[[Array], TrainState]:
    """key → TrainState, pure: for `jax.eval_shape` and for `jax.jit`."""

    def build(key: PRNGKey) -> TrainState:
        return new_state(init(jax.random.fold_in(key, INIT_STREAM)), optimizer, with_ema)

    return build


def first_state(
    build: Callable[[Array], TrainState],
    key: PRNGKey,
    start: Params | None,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> TrainState:
    """The state before the first step on its devices: `build`'s, or one with the parameters
    `start`, whole on every host. They are arguments, never constants of the program."""
    if start is None:
        return jax.jit(build, out_shardings=shardings)(key)
    begin = functools.partial(new_state, optimizer=optimizer, with_ema=shardings.ema is not None)
    placed = sharding.place(start, shardings.params)
    return jax.jit(begin, out_shardings=shardings)(placed)


def abstract_state(shapes: ArrayTree, shardings: ArrayTree) -> ArrayTree:
    """ShapeDtypeStructs that carry their shardings: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
