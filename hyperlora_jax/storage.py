"""Files in buckets (`gs://…`): results are written there, what is read a lot is copied here.

    fetched     a dataset or a base model, copied to this host's disk once
    scratch     where a run keeps what it can make again (renders, samples)
    pull, push  what a run on another host must find, between its scratch and its workdir
    writing     a local place for a result that belongs into a bucket

Checkpoints and logs are written to the bucket itself, by Orbax and by `train/json_lines.py`.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath
from tqdm import tqdm

from hyperlora_jax.errors import UserError


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` lies in an object store."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """As Orbax wants it. A path in a bucket is absolute; `resolve` would take it for a folder."""
    found = epath.Path(path)
    return found if is_remote(path) else found.resolve()


def outside_package(path: epath.PathLike, argument: str) -> None:
    """Nothing is written into the installed package, whose base and encoders everybody relies on.

    Raises:
        UserError: `path`, the value of `argument`, lies there.
    """
    package = Path(__file__).resolve().parent
    if not is_remote(path) and Path(str(path)).resolve().is_relative_to(package):
        raise UserError(f"{argument} {path}: lies in the installed package, expected another place")


def reason(error: Exception) -> str:
    """One line of an error that a file system, remote or not, has raised."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return " ".join(str(text).split())[:300]


def scratch(workdir: epath.PathLike) -> Path:
    """The workdir, or a folder of this host that stands for one in a bucket."""
    if not is_remote(workdir):
        return Path(str(workdir))
    folder = cache_folder() / "scratch" / _digest(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def local(path: epath.PathLike, command: str) -> Path:
    """`path`, for a command that works on a disk only.

    Raises:
        UserError: it lies in a bucket.
    """
    if is_remote(path):
        raise UserError(
            f"{path}: `hyperlora {command}` works in a local folder only; copy it to and fro "
            "(gcloud storage rsync -r)"
        )
    return Path(str(path))


def fetched(path: epath.PathLike) -> Path:
    """A local path, or a copy of the folder or file in a bucket; what is there already, of the
    same size, is not copied again.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    if not is_remote(path):
        return Path(str(path))
    target = cache_folder() / "fetched" / _digest(path) / str(path).rstrip("/").rsplit("/", 1)[-1]
    try:
        source = epath.Path(path)
        if not source.exists():
            raise UserError(f"{path}: no such folder or file, expected one in the bucket")
        files = [source] if not source.is_dir() else _files_below(source)
        for file in tqdm(files, desc=f"fetching {path}", unit="file"):
            place = target if file == source else target / file.relative_to(source)
            _copy(file, epath.Path(place))
    except UserError:
        raise
    except Exception as error:  # every file system has its own
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    return target


def pull(workdir: epath.PathLike, *names: str, missing_only: bool = False) -> None:
    """Makes files and folders of a workdir's scratch folder what they are in the bucket (whose
    copies may be another host's, or gone); nothing for a workdir on the disk.

    Args:
        missing_only: leaves the files that are there as they are.

    Raises:
        UserError: they cannot be read.
    """
    if not is_remote(workdir):
        return
    for name in names:
        source, target = epath.Path(workdir) / name, epath.Path(scratch(workdir)) / name
        try:
            if not missing_only:
                if target.is_dir():
                    target.rmtree()
                target.unlink(missing_ok=True)
            if source.exists():
                _copy_below(source, target, missing_only)
        except Exception as error:  # every file system has its own
            raise UserError(f"{source}: cannot be read ({reason(error)})") from error


def push(workdir: epath.PathLike, *names: str) -> None:
    """Copies files and folders of the scratch folder to a workdir in a bucket.

    Raises:
        UserError: it cannot be written.
    """
    if not is_remote(workdir):
        return
    for name in names:
        _upload(epath.Path(scratch(workdir)) / name, epath.Path(workdir) / name)


@contextlib.contextmanager
def writing(target: epath.PathLike, scratch_folder: Path) -> Iterator[Path]:
    """The folder to write what shall lie at `target`: itself, or one of the scratch folder that is
    copied there at the end.

    Raises:
        UserError: the bucket cannot be written.
    """
    if not is_remote(target):
        yield Path(str(target))
        return
    folder = scratch_folder / str(target).rstrip("/").rsplit("/", 1)[-1]
    yield folder
    _upload(epath.Path(folder), epath.Path(target))


def _upload(source: epath.Path, target: epath.Path) -> None:
    try:
        _copy_below(source, target)
    except Exception as error:
        raise UserError(f"{target}: cannot be written ({reason(error)})") from error


def _copy_below(source: epath.Path, target: epath.Path, missing_only: bool = False) -> None:
    """A file, or all files of a folder; what is there is replaced unless only missing ones are."""
    pairs = [(source, target)]
    if source.is_dir():
        pairs = [(file, target / file.relative_to(source)) for file in _files_below(source)]
    for file, place in pairs:
        if not (missing_only and place.exists()):
            _copy(file, place, always=True)


def replaced(path: epath.Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all, as objects in buckets do by themselves."""
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _files_below(folder: epath.Path) -> list[epath.Path]:
    found = []
    for item in sorted(folder.iterdir(), key=str):
        found += _files_below(item) if item.is_dir() else [item]
    return found


def _copy(source: epath.Path, target: epath.Path, always: bool = False) -> None:
    if not always and target.exists() and target.stat().length == source.stat().length:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):  # an object appears whole or not at all
        source.copy(target, overwrite=True)
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    source.copy(partial, overwrite=True)
    partial.replace(target)


def cache_folder() -> Path:
    """$HYPERLORA_CACHE, or ~/.cache/hyperlora_jax."""
    return Path(os.environ.get("HYPERLORA_CACHE") or "~/.cache/hyperlora_jax").expanduser()


def _digest(path: epath.PathLike) -> str:
    return hashlib.sha256(str(path).rstrip("/").encode()).hexdigest()[:16]
