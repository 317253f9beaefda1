"""AdamW or Muon, clipped by the global norm and with a warm-up, from keyword arguments of a config.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of every
matrix, so that all its directions move alike. Scaled to the size of AdamW's
steps (arXiv 2502.16982) it takes AdamW's learning rates; AdamW trains what else there is.
"""

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from hyperlora_jax.array_types import ArrayTree
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel.sharding import parameter_name


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


NAMES = ("adamw", "muon")
# Newton-Schulz iterations: a hypernetwork learned no less with three than with the usual five,
# which cost a CPU as much as a third of its step.
ITERATIONS = 3
MUON_RMS = 0.2  # of a step in units of the learning rate: what AdamW's steps have
# Kernels from and to pictures: their rows or columns are no features.
_OUTER = r"(.*/)?conv_(in|out)/kernel"
# Attention kernels [in, heads, width] and [heads, width, out]; the axes that a matrix maps from.
_FROM = ((r".*attention/(query|key|value)/kernel", (-3,), (-2, -1)),
         (r".*attention/out/kernel", (-3, -2), (-1,)))  # fmt: skip


def _is_matrix(params: ArrayTree) -> ArrayTree:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def matrices(params: ArrayTree) -> ArrayTree:
    """What Muon trains: for every kernel, which axes are a matrix's rows and columns (further ones
    count matrices: stacked blocks, heads of tokens); None for every other parameter.

    The heads belong to them: a batch of few subjects moves them in few directions.
    """

    def numbers(path: tuple[Any, ...], leaf: ArrayTree):
        axes = _axes(path, leaf)
        return None if axes is None else optax.contrib.MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(numbers, params)


def _axes(path: tuple[Any, ...], leaf: ArrayTree) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """A matrix's rows and columns."""
    name = parameter_name(path)
    if leaf.ndim < 2 or not name.endswith("kernel") or re.fullmatch(_OUTER, name):
        return None
    for pattern, rows, columns in _FROM:
        if leaf.ndim >= 3 and re.fullmatch(pattern, name):
            return rows, columns
    return ((-4, -3, -2) if leaf.ndim >= 4 else (-2,)), (-1,)  # four: a convolution's


def is_stack(path: tuple[Any, ...], leaf: ArrayTree) -> bool:
    """Whether the first axis of a parameter, or of its moments, counts matrices."""
    axes = _axes(path, leaf)
    return axes is not None and leaf.ndim > len(axes[0]) + len(axes[1])


def make_optimizer(
    num_steps: int,
    name: Literal["adamw", "muon"] = "adamw",
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = 1.0,
    **rate: Any,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(the optimiser, its learning rate); `rate` goes to `make_schedule`, clip_norm=None does not
    clip. `weight_decay` touches arrays of two or more dimensions, with Muon its own matrices.

    Raises:
      UserError: an unknown name; see `make_schedule`.
    """
    schedule = make_schedule(num_steps=num_steps, **rate)
    if name == "adamw":
        steps = optax.adamw(
            schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_is_matrix
        )
    elif name == "muon":
        steps = optax.contrib.muon(
            schedule,
            ns_steps=ITERATIONS,
            eps=eps,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=MUON_RMS,
        )
    else:
        raise UserError(f"optimizer.name: got {name!r}, expected one of {', '.join(NAMES)}")
    if clip_norm is None:
        return steps, schedule
    return optax.chain(optax.clip_by_global_norm(clip_norm), steps), schedule
