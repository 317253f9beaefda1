"""AdamW with global-norm clipping and a warm-up schedule, from keyword arguments of a config."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from hyperlora_jax.array_types import ArrayTree
from hyperlora_jax.errors import UserError


def make_schedule(
    learning_rate: float,
    num_steps: int,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Step → learning rate: linear warm-up to `learning_rate`, then decay to its `final_fraction`.

    Raises:
      UserError: an unknown schedule, or a negative warm-up.
    """
    if warmup_steps < 0:
        raise UserError(f"optimizer.warmup_steps: got {warmup_steps}, expected 0 or more")
    rest = max(num_steps - warmup_steps, 1)
    if schedule == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, rest, alpha=final_fraction)
    elif schedule == "linear":
        decay = optax.linear_schedule(learning_rate, learning_rate * final_fraction, rest)
    elif schedule == "constant":
        decay = optax.constant_schedule(learning_rate)
    else:
        raise UserError(f"optimizer.schedule: got {schedule!r}, expected cosine, linear, constant")
    # The first step already moves: step s of the warm-up has (s + 1) / (warmup + 1) of the rate.
    warmup = optax.linear_schedule(
        learning_rate / (warmup_steps + 1), learning_rate, max(warmup_steps, 1)
    )
    return optax.join_schedules([warmup, decay], [warmup_steps])


def _is_matrix(params: ArrayTree) -> ArrayTree:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def make_optimizer(
    num_steps: int,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = 1.0,
    **rate: Any,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(AdamW, its learning rate); `rate` goes to `make_schedule`, `weight_decay` touches arrays of
    two or more dimensions only, clip_norm=None does not clip.

    Raises:
      UserError: see `make_schedule`.
    """
    schedule = make_schedule(num_steps=num_steps, **rate)
    adam = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_is_matrix)
    if clip_norm is None:
        return adam, schedule
    return optax.chain(optax.clip_by_global_norm(clip_norm), adam), schedule
