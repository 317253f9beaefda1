"""JSONL files that only grow. Buckets cannot append: there, a local copy is uploaded."""

import contextlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError
from hyperlora_jax.storage import is_remote

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0


def read_rows(path: epath.PathLike) -> list[Json]:
    """The rows of a file; a line cut off by a kill ends it; no rows if there is no file."""
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class JsonLines:
    """Appends rows to `path`, starting from `rows` (what an earlier run left and is kept)."""

    def __init__(
        self,
        path: epath.PathLike,
        rows: list[Json],
        upload: bool | None = None,
    ):
        self._target = epath.Path(path)
        self._upload = is_remote(path) if upload is None else upload
        if self._upload:
            self._folder = tempfile.TemporaryDirectory(prefix="hyperlora-")
            self._local = Path(self._folder.name) / self._target.name
        else:
            self._local = Path(str(self._target))
        fresh = self._local.with_name(self._local.name + ".new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
        fresh.replace(self._local)
        self._file = self._local.open("a")
        self._uploaded = 0.0

    def write(self, row: Mapping[str, object]) -> None:
        """One row; numbers that JSON cannot hold become null.

        Raises:
          UserError: the disk is full or gone.
        """
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._local}: cannot write ({error.strerror or error})") from error
        if self._upload and time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._send()

    def _send(self) -> None:
        self._uploaded = time.monotonic()
        try:
            self._target.write_text(self._local.read_text())
        except OSError as error:  # the next upload carries these rows too
            log.warning("%s: upload failed (%s)", self._target, error)

    def close(self) -> None:
        """Closes the file, in a bucket after its last upload."""
        with contextlib.suppress(OSError):  # a full disk was reported by `write`
            self._file.close()
        if self._upload:
            self._send()
            self._folder.cleanup()
