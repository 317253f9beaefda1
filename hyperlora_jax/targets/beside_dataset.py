"""What is worked out about a dataset and kept, so that no run does it again.

    DATASET/cache/NAME-DIGEST…

or, where the dataset's folder cannot be written, a folder of the run. The digest is that of the
dataset's description and of its files' names, sizes and times. All of it may be deleted.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)


def digest(dataset: Path) -> str:
    """Changes with every file of the dataset."""
    sha = hashlib.sha256()
    for name in ("metadata.json", "index.json", "dataset_info.json"):
        file = dataset / name
        sha.update(file.read_bytes() if file.is_file() else b"missing")
    for shard in sorted(dataset.glob("*.array_record-*")):
        status = shard.stat()
        sha.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}".encode())
    return sha.hexdigest()[:24]


def folders(dataset: Path, of_run: str | Path | None = None) -> list[Path]:
    """Where things are kept, in order of preference."""
    return [dataset / "cache", *([] if of_run is None else [Path(of_run)])]


def written(places: Sequence[Path], name: str, write: Callable[[BinaryIO], None]) -> Path:
    """The file that `write` fills, whole or not at all, in the first folder that can be written.

    Raises:
        OSError: of the last folder, when none can be.
    """
    for place in places:
        path = place / name
        partial = place / f".{name}.{os.getpid()}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                write(file)
            partial.replace(path)
            return path
        except OSError as error:
            log.info("%s: cannot be written (%s)", path, error)
            if place is places[-1]:
                raise
        finally:
            if partial.exists():
                partial.unlink()
    raise ValueError("no folder given")
