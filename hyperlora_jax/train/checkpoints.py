"""Checkpoints of a run: WORKDIR/checkpoints/STEP/{state, data, meta, metrics}, by Orbax, async.

`state` is the TrainState (never the frozen base), `data` the position of the data iterator, `meta`
the run's facts (what it was trained on) and its resolved config, `metrics` the mean loss of the
steps since the checkpoint before, by which the best ones are kept beside the newest. A checkpoint
that a kill left half written is skipped with a warning; one that is whole but cannot be read stops
the run.
"""

import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from hyperlora_jax import facts
from hyperlora_jax.array_types import Json, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import multihost
from hyperlora_jax.storage import absolute
from hyperlora_jax.train.state import TrainState

log = logging.getLogger(__name__)

ITEMS = ("state", "data", "meta")
# Settings that give the state its structure: another name, or one that is there on one side only.
_SHAPING = ("ema_decay", "optimizer.clip_norm", "optimizer.name")
_FILES = ("_CHECKPOINT_METADATA", "state/_METADATA", "data/metadata", "meta/metadata")


def missing_files(folder: epath.Path) -> list[str]:
    """What a checkpoint folder lacks; an empty list means that it was written to its end."""
    missing = [name for name in _FILES if not (folder / name).exists()]
    if not missing and not _object(folder / _FILES[0]).get("commit_timestamp_nsecs"):
        missing = ["commit_timestamp_nsecs"]
    texts = [name for name in ("meta/metadata", "metrics/metrics") if (folder / name).exists()]
    return missing or [f"readable {name}" for name in texts if not _object(folder / name)]


def _object(file: epath.Path) -> Json:
    """A file's JSON object; an empty one where it was cut off."""
    try:
        content = json.loads(file.read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def complete_steps(directory: epath.PathLike) -> list[int]:
    """Steps with a whole checkpoint, ascending; warns about every half-written one by name."""
    directory = epath.Path(directory)
    steps = []
    for folder in sorted(directory.iterdir()) if directory.exists() else []:
        if ".orbax-checkpoint-tmp" in folder.name:
            log.warning("skipping half-written checkpoint %s", folder)
        elif folder.name.isdigit():
            missing = missing_files(folder)
            if missing:
                log.warning("skipping half-written checkpoint %s: no %s", folder, missing[0])
            else:
                steps.append(int(folder.name))
    return sorted(steps)


def _set_aside(directory: epath.Path, whole: list[int]) -> None:
    """Renames half-written STEP folders, so that the step can be saved again; keeps their bytes."""
    if not multihost.is_first() or not directory.exists():  # a bucket has no empty folders
        return
    for folder in list(directory.iterdir()):
        if folder.name.isdigit() and int(folder.name) not in whole:
            target = directory / f"half-written-{folder.name}"
            if target.exists():
                target.rmtree()
            folder.rename(target)


def read_meta(directory: epath.PathLike, step: int) -> Json:
    """{"facts": …, "config": …} of one checkpoint, read without touching its arrays."""
    return json.loads((epath.Path(directory) / str(step) / "meta" / "metadata").read_text())


def check_facts(saved: Mapping[str, object], expected: Mapping[str, object], where: str) -> None:
    """Refuses to go on with a checkpoint of something else; see `facts.differences`.

    Raises:
      UserError: names the facts that differ, with both sides.
    """
    differences = facts.differences(saved, expected)
    if differences:
        raise UserError(facts.refusal(where, differences))


def changed_settings(
    saved: Mapping[str, object], expected: Mapping[str, object], where: str
) -> facts.Differences:
    """What else differs of how a run is trained: {"ema_decay": …, "optimizer": {…}} on both sides.

    Raises:
      UserError: another optimiser, a moving average or clipping that is there on one side only: the
        state of one has no place for that of the other.
    """
    differences = facts.differences(_named(saved), _named(expected))
    shape = {
        name: pair
        for name, pair in differences.items()
        if name in _SHAPING and (None in pair or name == "optimizer.name")
    }
    if shape:
        raise UserError(
            f"{facts.refusal(where, shape).removesuffix('; use another workdir')}; keep the "
            "setting, or use another workdir"
        )
    return differences


def _named(settings: Mapping[str, object]) -> Json:
    """With the optimiser that was meant where older runs name none."""
    optimizer = settings.get("optimizer", {})
    assert isinstance(optimizer, Mapping)
    return {**settings, "optimizer": {"name": "adamw", **optimizer}}


def best_step(directory: epath.PathLike) -> int | None:
    """The whole checkpoint of the lowest mean loss; None where none says its loss."""
    losses = {}
    for step in complete_steps(directory):
        file = epath.Path(directory) / str(step) / "metrics" / "metrics"
        if file.exists():
            losses[step] = json.loads(file.read_text())["loss"]
    return min(losses, key=losses.__getitem__) if losses else None


def restore_params(
    workdir: epath.PathLike, step: int | Literal["best"] | None = None
) -> tuple[Params, Json]:
    """(parameters as numpy arrays, {"facts", "config", "seed", "step"}), without the optimiser.

    Takes the newest whole checkpoint of `workdir` unless `step` says which ("best": that of the
    lowest mean loss), and the moving average if there is one.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    directory = absolute(workdir) / "checkpoints"
    steps = complete_steps(directory)
    step = best_step(directory) if step == "best" else step
    if not steps or (step is not None and step not in steps):
        raise UserError(
            f"{directory}: found checkpoints of steps {steps}, expected {step or 'one'}"
        )
    step = steps[-1] if step is None else step
    handler = ocp.PyTreeCheckpointHandler()
    try:
        folder = directory / str(step) / "state"
        tree = handler.metadata(folder).tree
        name = "ema" if tree.get("ema") else "params"
        item = {name: jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), tree[name])}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        restore = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        params = handler.restore(folder, args=restore)[name]
    except Exception as error:
        raise UserError(_cannot_restore(directory / str(step), error)) from error
    finally:
        handler.close()
    return params, {**read_meta(directory, step), "step": step}


def _quality(metrics: Mapping[str, float]) -> float:
    return -metrics["loss"]


def _leaf_shapes(tree: object) -> dict[str, tuple[int, ...]]:
    """{"opt_state.1.0.mu.hidden.bias": shape} of a state or of what a checkpoint says it holds."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in
                 path): tuple(leaf.shape)
        for path, leaf in leaves
    }  # fmt: skip


def _other_settings(folder: epath.Path, abstract: TrainState) -> str:
    """How a sound checkpoint's state differs from the run's; "" where it does not, or where not
    even its description can be read."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = _leaf_shapes(handler.metadata(folder / "state").tree)
    except Exception:  # its own files are damaged
        return ""
    finally:
        handler.close()
    wanted = _leaf_shapes(abstract)
    differ = sorted(name for name in {*saved, *wanted} if saved.get(name) != wanted.get(name))
    if not differ:
        return ""
    # Another model shows in the average and in the optimiser's state too.
    first = min(differ, key=lambda name: (not name.startswith("params."), name))
    group = first.partition(".")[0]
    settings = {"ema": "train.ema_decay", "opt_state": "train.optimizer (name, clip_norm)"}
    return (
        f"{folder}: is sound, but of other settings than this run's "
        f"{settings.get(group, 'model')}: {first} has shape {saved.get(first)} there, "
        f"{wanted.get(first)} here; keep the setting, or use another workdir"
    )


def _cannot_restore(folder: epath.Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else "no reason given"
    return (
        f"{folder}: cannot restore this checkpoint ({type(error).__name__}: {reason});"
        " delete its folder to go on from the one before"
    )


class Checkpoints:
    """The checkpoints of one workdir, open for saving and restoring."""

    def __init__(self, workdir: epath.PathLike, keep: int, keep_best: int = 0):
        self.directory = absolute(workdir) / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        # All processes go by what the first one found: a listing can differ between hosts.
        steps = json.dumps(complete_steps(self.directory) if multihost.is_first() else [])
        self._steps = json.loads(multihost.agree(f"checkpoints/{self.directory}", steps))
        _set_aside(self.directory, self._steps)
        policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(keep)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=_quality, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_quality,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            step_name_format=ocp.path.step.standard_name_format(),
        )
        self._failed = False
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, None without any."""
        return self._steps[-1] if self._steps else None

    def save(
        self, step: int, state: TrainState, data: object, meta: Mapping[str, object], loss: float
    ) -> None:
        """Starts writing; returns when the arrays are copied off the device.

        Args:
          loss: what the best checkpoints have least of.

        Raises:
          UserError: this one or the one before could not be written (full disk, lost bucket).
        """
        if step in self._steps:
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"iterator": data}),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        with self._writing():
            self._manager.save(step, args=arguments, metrics={"loss": loss}, force=True)
        self._steps.append(step)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Json]:
        """(state, iterator position) of `step`, placed as `abstract` says.

        Raises:
          UserError: the checkpoint cannot be read into this model; never a fresh start instead.
        """
        folder = self.directory / str(step)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:
            other = _other_settings(folder, abstract)
            raise UserError(other or _cannot_restore(folder, error)) from error
        return restored["state"], restored["data"]["iterator"]

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
          UserError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
            raise UserError(
                f"{self.directory}: cannot write a checkpoint ({type(error).__name__}: {reason});"
                f" whole checkpoints: {complete_steps(self.directory)}"
            ) from error

    def close(self, patience: float | None = None) -> None:
        """Waits and closes; a failed writer is not asked again.

        Args:
          patience: seconds for the save under way, where an error of this process may keep the
            others from writing their part of it; None waits for as long as it takes.
        """
        if self._failed:
            return
        if patience is None:
            with self._writing():
                self._manager.close()
        else:
            closing = threading.Thread(target=self._close_silently, daemon=True)
            closing.start()
            closing.join(patience)

    def _close_silently(self) -> None:
        with contextlib.suppress(Exception):  # the error that ends the run is another one
            self._manager.close()
