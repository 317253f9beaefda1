"""Files in buckets (`gs://…`): results are written there, what is read a lot is copied here.

    place       a path, local or in a bucket that can be reached from here
    replaced    a file that appears whole or not at all, at either
    fetched     a dataset or a base model, copied to this host's disk until it changes
    scratch     where a run keeps what it can make again (renders, samples)
    pull, push  what a run on another host must find, between its scratch and its workdir
    writing     a local place for a result that belongs into a bucket
    output      the same for what a command was asked to write

Checkpoints and logs are written to the bucket itself, by Orbax and by `train/json_lines.py`.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath

from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

# Schemes of buckets: what reads and writes them, and the extra of this package that installs it.
SCHEMES = {
    "gs": ("gcsfs", "gcs"),
    "s3": ("s3fs", "s3"),
    "az": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
}
# What a file system says of an object's content; sizes alone prove nothing.
_VERSIONS = (
    "generation", "md5Hash", "etag", "ETag", "content_md5", "VersionId", "updated", "mtime",
    "created", "LastModified", "last_modified",
)  # fmt: skip


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` lies in an object store."""
    return "://" in str(path)


def place(path: epath.PathLike) -> Path | epath.Path:
    """The path to read or write: local as it is, in a bucket where that can be reached.

    Raises:
        UserError: an address of another kind, or one whose package is not installed.
    """
    if not is_remote(path):
        return Path(str(path))
    check_bucket(path)
    return epath.Path(str(path).replace("abfs://", "az://", 1))


def check_bucket(path: epath.PathLike) -> None:
    """Whether this installation reads and writes buckets of an address's kind.

    Raises:
        UserError: it does not.
    """
    scheme = str(path).partition("://")[0]
    if scheme not in SCHEMES:
        schemes = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{path}: no address that can be read or written, expected {schemes}")
    import fsspec

    package, extra = SCHEMES[scheme]
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        if scheme == "gs" and importlib.util.find_spec("tensorflow"):
            return  # whose own reader is taken then
        raise UserError(
            f"{path}: needs {package}, which is not installed; pip install 'hyperlora-jax[{extra}]'"
        ) from None


def absolute(path: epath.PathLike) -> epath.Path:
    """As Orbax wants it. A path in a bucket is absolute; `resolve` would take it for a folder."""
    absolute_path = epath.Path(path)
    return absolute_path if is_remote(path) else absolute_path.resolve()


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
    folder = cache_folder() / "scratch" / digest(workdir)
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
    """A local path, or a copy of the folder or file in a bucket: of what it holds now, by the
    versions that its file system gives; only what has another version is copied again.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    if not is_remote(path):
        return Path(str(path))
    target = cache_folder() / "fetched" / digest(path) / str(path).rstrip("/").rsplit("/", 1)[-1]
    manifest = target.with_name(f".{target.name}.versions.json")
    try:
        source = epath.Path(place(path))
        if not source.exists():
            raise UserError(f"{path}: no such folder or file, expected one in the bucket")
        there = _versions(source)
        copied = _copied(manifest)
        stale = [
            name
            for name, version in there.items()
            if not version or copied.get(name) != version or not (target / name).is_file()
        ]
        _remove_others(target, there)
        from tqdm import tqdm

        try:
            for name in tqdm(stale, f"fetching {path}", unit="file", disable=not stale):
                copied.pop(name, None)
                _copy(source / name if name else source, epath.Path(target / name))
                copied[name] = there[name]
        finally:
            if stale:
                manifest.parent.mkdir(parents=True, exist_ok=True)
                replaced(epath.Path(manifest), json.dumps(copied).encode())
    except UserError:
        raise
    except Exception as error:  # every file system has its own
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    return target


def _versions(source: epath.Path) -> dict[str, str]:
    """{path below the source: version} of all its files; "" is the path of a source that is a file,
    and the version of one of which nothing but the size is known."""
    import fsspec

    try:
        file_system, root = fsspec.core.url_to_fs(str(source))
    except ImportError:  # read by TensorFlow, which tells no versions
        if not source.is_dir():
            return {"": ""}
        return {str(file.relative_to(source)): "" for file in _files_below(source)}
    file_system.invalidate_cache()
    if not source.is_dir():
        return {"": _version(file_system.info(root))}
    listing = file_system.find(root, detail=True)
    names = {name: name.removeprefix(root.rstrip("/")).strip("/") for name in listing}
    # Some tools make empty objects that stand for folders.
    return {
        names[name]: _version(info)
        for name, info in listing.items()
        if names[name] and info.get("type") != "directory" and not name.endswith("/")
    }


def _version(info: Mapping[str, object]) -> str:
    versions = {name: str(info[name]) for name in _VERSIONS if info.get(name)}
    return json.dumps({**versions, "size": info.get("size")}) if versions else ""


def _copied(manifest: Path) -> dict[str, str]:
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # nothing is known of what lies there


def _remove_others(target: Path, names: Mapping[str, str]) -> None:
    """Removes from a copy what is no longer in the bucket."""
    if not target.is_dir():
        return
    if "" in names:
        epath.Path(target).rmtree()
        return
    for file in _files_below(epath.Path(target)):
        copying = file.name.startswith(".") and file.name.endswith(".partial")  # by another process
        if not copying and str(file.relative_to(target)) not in names:
            file.unlink()


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


@contextlib.contextmanager
def output(path: epath.PathLike) -> Iterator[Path]:
    """A local path to write a result to, with others beside it (`NAME-0.safetensors`): the path
    itself, or one in a temporary folder whose content goes into the bucket at the end, also of a
    command that ends with a UserError.

    Raises:
        UserError: a bucket that cannot be reached from here, or not be written.
    """
    if not is_remote(path):
        yield Path(str(path))
        return
    target = epath.Path(place(path))
    with tempfile.TemporaryDirectory(prefix="hyperlora-") as folder:
        try:
            yield Path(folder) / target.name
        except UserError:
            _upload(epath.Path(folder), target.parent)
            raise
        _upload(epath.Path(folder), target.parent)


@contextlib.contextmanager
def asking(path: epath.PathLike) -> Iterator[None]:
    """Around questions to a bucket: whatever its file system raises is one line.

    Raises:
        UserError: it cannot be reached.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every file system has its own
        raise UserError(f"{path}: cannot be reached ({reason(error)})") from error


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
    for file, there in pairs:
        if not (missing_only and there.exists()):
            _copy(file, there)


def replaced(path: epath.PathLike, *parts: "bytes | memoryview | np.ndarray") -> None:
    """Puts the joined parts (bytes, arrays) at a path in one step. A file appears whole or not at
    all, even when the power fails: temporary file, fsync, rename. Objects in buckets do so by
    themselves.

    Raises:
        OSError: it cannot be written; other errors where it lies in a bucket.
    """
    if is_remote(path):
        epath.Path(path).write_bytes(b"".join(bytes(memoryview(part)) for part in parts))
        return
    target = Path(str(path))
    temporary = target.with_name(f".{secrets.token_hex(6)}.partial")
    # Mode "x" never follows or takes over what is there.
    with temporary.open("xb", buffering=0) as file:
        try:
            for part in parts:
                write_all(file.fileno(), part)
            os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_all(descriptor: int, part: "bytes | memoryview | np.ndarray") -> None:
    """One call may write less than it is given, 2 GiB at most."""
    rest = memoryview(part).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _files_below(folder: epath.Path) -> list[epath.Path]:
    files = []
    for item in sorted(folder.iterdir(), key=str):
        files += _files_below(item) if item.is_dir() else [item]
    return files


def _copy(source: epath.Path, target: epath.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):  # an object appears whole or not at all
        source.copy(target, overwrite=True)
        return
    partial = target.with_name(f".{secrets.token_hex(6)}.partial")
    try:
        source.copy(partial, overwrite=True)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """$HYPERLORA_CACHE, or ~/.cache/hyperlora_jax."""
    return Path(os.environ.get("HYPERLORA_CACHE") or "~/.cache/hyperlora_jax").expanduser()


def digest(path: epath.PathLike) -> str:
    """A short name for a path."""
    return hashlib.sha256(str(path).rstrip("/").encode()).hexdigest()[:16]
