"""Logged rows as TensorBoard's events, in WORKDIR/tensorboard; where that is a bucket, of a local
copy that is uploaded now and then."""

import importlib.util
import time
from collections.abc import Mapping

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError
from hyperlora_jax.train.json_lines import UPLOAD_SECONDS

FOLDER = "tensorboard"


def check_installed() -> None:
    """Raises UserError where the optional package is missing."""
    try:
        spec = importlib.util.find_spec("tensorboardX")
    except ValueError:
        spec = None
    if spec is None:
        raise UserError(
            "train.tensorboard: package tensorboardX is not installed;"
            ' pip install "hyperlora-jax[tensorboard]"'
        )


class Board:
    """The events of one process.

    Raises:
      UserError: the optional package is not installed.
    """

    def __init__(self, workdir: epath.PathLike):
        check_installed()
        from tensorboardX import SummaryWriter

        self._workdir = workdir
        self._writer = SummaryWriter(str(storage.scratch(workdir) / FOLDER))
        self._uploaded = time.monotonic()

    def write(self, row: Mapping[str, float | int], step: int) -> None:
        """Every value of a row under its name."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._writer.flush()
            storage.push(self._workdir, FOLDER)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
        storage.push(self._workdir, FOLDER)
