"""Logged rows for people's dashboards: TensorBoard, Weights & Biases, trackio.

A workdir is one run for all of them, however often it is stopped and goes on: its id lies in
WORKDIR/tracker.json. A run that was killed computes some logged steps again. TensorBoard is told to
forget the old ones; the other two cannot forget, so they are not given those steps twice.
"""

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError
from hyperlora_jax.train.json_lines import UPLOAD_SECONDS

PROJECT = "hyperlora"
RUN_FILE = "tracker.json"
# Name in `train.trackers`: the package it needs, which is also the name of the extra.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


@runtime_checkable
class Tracker(Protocol):
    """Takes the rows of one process."""

    def write(self, row: Mapping[str, float | int], step: int) -> None:
        """Every value of a row under its name."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run.

    Attributes:
        workdir: local, or a bucket; files are then made in a local copy and uploaded.
        name: of the task.
        config: the resolved config.
        start_step: the step of the checkpoint that it goes on from; 0 at first.
        logged_step: the last step that an earlier start has logged, at least `start_step`.
    """

    workdir: epath.Path
    name: str
    config: Mapping[str, object]
    start_step: int
    logged_step: int

    def id(self) -> str:
        """Twelve letters and digits, the same at every start of the workdir."""
        path = self.workdir / RUN_FILE
        if path.exists():
            try:
                return str(json.loads(path.read_text())["id"])
            except (ValueError, TypeError, KeyError):
                raise UserError(f'{path}: is damaged, expected {{"id": …}}') from None
        name = uuid.uuid4().hex[:12]
        storage.replaced(path, json.dumps({"id": name}).encode())
        return name


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose package is missing, or that would need a login first."""
    for name in names:
        package = PACKAGES[name]
        try:
            spec = importlib.util.find_spec(package)
        except ValueError:
            spec = None
        if spec is None:
            raise UserError(
                f"train.trackers: package {package} is not installed;"
                f' pip install "hyperlora-jax[{name}]"'
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError(
                "train.trackers: wandb has no API key; run `wandb login`, or set WANDB_MODE=offline"
            )


def open_trackers(names: Sequence[str], run: Run) -> list[Tracker]:
    """Those of `train.trackers`.

    Raises:
        UserError: an optional package is not installed, no login.
    """
    check_installed(names)
    kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
    return [kinds[name](run) for name in names]


class TensorBoard:
    """Events in WORKDIR/tensorboard."""

    FOLDER = "tensorboard"

    def __init__(self, run: Run):
        from tensorboardX import SummaryWriter

        self._workdir = run.workdir
        purge = run.start_step + 1 if run.start_step else None
        folder = str(storage.scratch(run.workdir) / self.FOLDER)
        # tensorboardX names a file by the second: of two starts within one the later would take the
        # place of the earlier.
        suffix = f".{run.start_step:09d}"
        self._writer = SummaryWriter(folder, purge_step=purge, filename_suffix=suffix)
        self._uploaded = time.monotonic()

    def write(self, row: Mapping[str, float | int], step: int) -> None:
        """Every value of a row under its name."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._writer.flush()
            storage.push(self._workdir, self.FOLDER)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
        storage.push(self._workdir, self.FOLDER)


class WeightsAndBiases:
    """A run of Weights & Biases, its files in WORKDIR/wandb. WANDB_PROJECT, WANDB_MODE=offline and
    its other variables of the environment hold."""

    FOLDER = "wandb"

    def __init__(self, run: Run):
        import wandb

        self._workdir, self._logged = run.workdir, run.logged_step
        self._run = wandb.init(
            id=run.id(),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", f"{run.workdir.name}/{run.name}"),
            dir=str(storage.scratch(run.workdir)),
            config=dict(run.config),
        )

    def write(self, row: Mapping[str, float | int], step: int) -> None:
        """Every value of a row under its name."""
        if step > self._logged:
            self._run.log(dict(row), step=step)

    def close(self) -> None:
        """Writes what is left."""
        self._run.finish()
        storage.push(self._workdir, self.FOLDER)


class Trackio:
    """A run of trackio, in its own folder (TRACKIO_DIR) or Space (TRACKIO_SPACE_ID)."""

    def __init__(self, run: Run):
        import trackio

        self._logged = run.logged_step
        # A run of trackio is known by its name alone.
        name = f"{run.workdir.name}-{run.id()}"
        self._run = trackio.init(
            project=PROJECT, name=name, resume="allow", config=dict(run.config), embed=False
        )

    def write(self, row: Mapping[str, float | int], step: int) -> None:
        """Every value of a row under its name."""
        if step > self._logged:
            self._run.log(dict(row), step=step)

    def close(self) -> None:
        """Writes what is left."""
        self._run.finish()
