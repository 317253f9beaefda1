"""Arguments that are addresses in buckets (`gs://…`): refused before any work where they cannot be
reached, copied here and there for the commands that know files of a disk only.

Workdirs, bases, datasets and checkpoints are read and written by the commands themselves.
"""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError

INPUTS = {
    "convert": ("source", "base"),
    "directions": ("labels",),
    "extract": ("base", "tuned"),
    "generate": ("reference", "subjects"),
    "import": ("paths", "base", "identities"),
    "merge": ("loras", "base", "into"),
    "refine": ("lora", "images"),
    "sample": ("lora",),
}
OUTPUTS = {
    "convert": "out",
    "directions": "out",
    "evaluate": "json",
    "extract": "out",
    "generate": "out",
    "import": "out",
    "merge": "out",
    "refine": "out",
    "sample": "out",
}
ASKED = {"export": "workdir", "generate": "checkpoint"}  # read by the command itself
LOCAL_ONLY = {"compile": "json"}
TEXTS = {"prompt", "negative_prompt", "caption", "edit"}  # no paths, whatever they look like
_ADDRESS = re.compile(r"^([^=]*=)?([a-z][a-z0-9+]*://.*)$")


def check(args: argparse.Namespace) -> None:
    """Makes sure that every address among a command's arguments can be reached; `abfs://` becomes
    its other name `az://`.

    Raises:
        UserError: it cannot, with what to install.
    """
    values = vars(args)
    for name in values.keys() - TEXTS:
        values[name] = _each(values[name], _checked)


def _checked(text: str) -> str:
    parts = _ADDRESS.match(text)
    if not parts:
        return text
    for part in parts[2].split(","):  # several sources, or LORA=WEIGHT
        address, weight, number = part.strip().rpartition("=")
        address = address if weight and not storage.is_remote(number) else part.strip()
        if storage.is_remote(address):
            storage.check_bucket(address)
    return text.replace("abfs://", "az://")


@contextlib.contextmanager
def local_arguments(command: str, args: argparse.Namespace) -> Iterator[None]:
    """Around a command: its inputs in buckets are copies on this disk, its output is one that goes
    into the bucket at the end; what is printed names the bucket.

    Raises:
        UserError: an address that does not exist or cannot be read or written.
    """
    values = vars(args)
    for name in INPUTS.get(command, ()):
        values[name] = _each(values.get(name), _fetched)
    asked, local_only = values.get(ASKED.get(command, "")), LOCAL_ONLY.get(command, "")
    if asked and storage.is_remote(asked):
        with storage.asking(asked):
            epath.Path(asked).exists()
    if values.get(local_only):
        storage.local(values[local_only], command)
    name = OUTPUTS.get(command, "")
    out = values.get(name)
    if not out or not storage.is_remote(out):
        yield
        return
    if command == "import" and not args.overwrite:
        with storage.asking(out):
            if epath.Path(out).exists():
                raise UserError(f"{out}: exists, expected a new dataset folder or --overwrite")
    with storage.output(out) as local:
        values[name] = str(local)
        shown = {str(local.parent): str(out).rstrip("/").rpartition("/")[0]}
        with contextlib.redirect_stdout(_Renaming(sys.stdout, shown)):
            yield


def _fetched(text: str) -> str:
    parts = _ADDRESS.match(text)
    if not parts:
        return text
    if parts[1]:  # NAME=address
        return f"{parts[1]}{storage.fetched(parts[2])}"
    address, weight, number = text.rpartition("=")  # address=WEIGHT
    if weight and not storage.is_remote(number):
        return f"{storage.fetched(address)}={number}"
    return str(storage.fetched(text))


def _each(value: object, change: Callable[[str], str]) -> object:
    """A text, or every text of a list, changed."""
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


class _Renaming:
    """A stream that writes other names for some paths."""

    def __init__(self, stream: io.TextIOBase, names: Mapping[str, str]):
        self._stream, self._names = stream, names

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text with the names that it shall show."""
        for path, name in self._names.items():
            text = text.replace(path, name)
        return self._stream.write(text)
