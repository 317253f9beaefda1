"""Content hashes of files, so that a run knows its pictures wherever they lie.

A hash is kept by the file's path, size and time of change: a restart on 480,000 pictures reads none
of them again. Pictures that were moved are read once more and found to be the same.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath
from tqdm import tqdm

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError

LENGTH = 32  # hexadecimal digits of a hash: 128 bits
SHOWN = 2000  # files to read from which on progress is shown
Kept = dict[str, list]  # path below the root: [size, nanoseconds, hash]


def content_hashes(root: Path, files: Sequence[str]) -> list[str]:
    """Hash of every file's bytes; those known by size and time of change are not read.

    Args:
        root: folder of all files; what is known of them is kept in one file in the cache folder.
        files: paths, which begin with that of `root`.

    Raises:
        UserError: a file cannot be read.
    """
    place = _place(root)
    cached = _read(place)
    start = os.path.join(root, "")  # noqa: PTH118
    names = [file.removeprefix(start) for file in files]
    now = []
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        now.append([status.st_size, status.st_mtime_ns])
    unknown = [k for k, name in enumerate(names) if cached.get(name, ())[:2] != now[k]]
    with ThreadPoolExecutor() as threads:
        read = threads.map(_hash, [files[k] for k in unknown])
        title = f"looking at {root.name}"
        shown = tqdm(
            zip(unknown, read, strict=True), title, len(unknown), disable=len(unknown) < SHOWN
        )
        for k, value in shown:
            cached[names[k]] = [*now[k], value]
    if unknown:
        _write(place, cached)
    return [cached[name][2] for name in names]


def _hash(file: str) -> str:
    try:
        with Path(file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()[:LENGTH]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _place(root: Path) -> Path:
    name = hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:16]
    return storage.cache_folder() / "picture_hashes" / f"{name}.json"


def _read(place: Path) -> Kept:
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # it is made again


def _write(place: Path, cached: Kept) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        storage.replaced(epath.Path(place), json.dumps(cached).encode())
    except OSError:
        return  # a home that cannot be written: read again next time
