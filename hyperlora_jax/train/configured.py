"""`loop.fit` as a config's section describes it."""

from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from hyperlora_jax import storage
from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.train.loop import Task, fit

OPTIONS = ("keep", "keep_best", "tensorboard", "stall_timeout_seconds")


def arithmetic_dtype(section: Any) -> Any:
    """The dtype that a `train` section names.

    Raises:
        UserError: it is neither float32 nor bfloat16.
    """
    if section.dtype not in ("float32", "bfloat16"):
        raise UserError(f"train.dtype: got {section.dtype!r}, expected float32 or bfloat16")
    return jnp.dtype(section.dtype)


def export_folder(config: Any, workdir: epath.PathLike, name: str) -> epath.Path:
    """Where the result goes: `export.path`, or WORKDIR/name where that is empty.

    Raises:
        UserError: in the installed package, unless `export.into_package` is True.
    """
    out = epath.Path(config.export.path or epath.Path(workdir) / name)
    if not config.export.get("into_package", False):
        storage.outside_package(out, "export.path")
    return out


def fit_section(
    task: Task, section: Any, *, workdir: epath.PathLike, mesh: Mesh, seed: int, config: Any
) -> Params:
    """Trains `task`; returns its averaged parameters, or the last ones where none are averaged.

    Args:
        section: ConfigDict with num_steps, optimizer, log_every_steps, checkpoint_every_steps and
            ema_decay (None: no average); and what else of `OPTIONS` differs from `loop.fit`'s.
        config: the whole ConfigDict, kept beside the checkpoints.

    Raises:
        UserError, TrainingDiverged, Preempted: see `loop.fit`.
    """
    window = tuple(section.get("profile_steps", ()))
    if window and not (len(window) == 2 and 1 <= window[0] <= window[1]):
        raise UserError(f"train.profile_steps: got {window}, expected () or (first, last)")
    state = fit(
        task,
        workdir=workdir,
        mesh=mesh,
        seed=seed,
        num_steps=section.num_steps,
        optimizer=dict(section.optimizer),
        log_every_steps=section.log_every_steps,
        checkpoint_every_steps=section.checkpoint_every_steps,
        ema_decay=section.ema_decay,
        config=config.to_dict(),
        profile_steps=window or None,
        **{name: section[name] for name in OPTIONS if name in section},
    )
    return state.params if state.ema is None else state.ema
