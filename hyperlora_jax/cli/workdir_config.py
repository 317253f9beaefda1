"""Workdirs remember: WORKDIR/config.json is the config of the run, for all commands of it.

    hyperlora distill  --config configs/avatars.py --workdir runs/mine --config.data.source=pics
    hyperlora train    --config configs/avatars.py --workdir runs/mine
    hyperlora evaluate --workdir runs/mine

One rule: what was given on a command line holds for later commands of the workdir until it is given
anew. Everything else comes from --config, or from the workdir where that is left out. A config file
that contradicts what was made from the workdir's (its base, its pictures and, once a hypernetwork
has been trained, its data and model) is refused, unless the key is given on the command line.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence

from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json
from hyperlora_jax.cli import config_checks, config_counts
from hyperlora_jax.cli.config import GIVEN, flatten, overridden, read_file
from hyperlora_jax.errors import UserError

FILE = "config.json"
PICTURES = ("base", "data.source", "data.style", "data.size", "data.split_seed")
TRAINED = ("base", "data", "model")  # once there are checkpoints
OWN_PICTURES = "my_pictures"  # the config for a folder of pictures and nothing else
SAID = 6  # remembered values in the line about them
MADE = ("checkpoints", "autoencoder", "hypernetwork", "spool", "targets")  # by a run's work


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """--config FILE and --workdir DIR; overrides are collected by the main program."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config file, or the name of one of the package's (my_pictures, sd15, …); default: the"
        " workdir's own, or my_pictures where --config.data.source is given",
    )
    parser.add_argument("--workdir", metavar="DIR", help="where everything goes")


def read_config(workdir: epath.PathLike) -> ConfigDict | None:
    """The config that a run's workdir remembers; None where it has none.

    Raises:
        UserError: config.json cannot be read.
    """
    file = epath.Path(workdir) / FILE
    try:
        if not file.exists():
            return None
        content = json.loads(file.read_text())
    except ValueError:
        content = None
    except Exception as error:  # a bucket's file system has errors of its own
        raise UserError(f"{file}: cannot be read ({storage.reason(error)})") from error
    own = content.get("config") if isinstance(content, dict) else None
    if not isinstance(own, dict):
        raise UserError(f'{file}: found no JSON object with a "config", expected that of a run')
    return ConfigDict(_with_tuples(own))


def run_config(
    config: epath.PathLike | None, workdir: epath.PathLike, overrides: Sequence[str] = ()
) -> ConfigDict:
    """The config of a command on a workdir, by the rule of this file's head.

    Raises:
        UserError: neither a config file nor a workdir that remembers one, a file that contradicts
            the workdir; see also `load_config`.
    """
    own = read_config(workdir)
    if config is None:
        if own is None and any(item.startswith("--config.data.source=") for item in overrides):
            return overridden(read_file(OWN_PICTURES), overrides)
        if own is None:
            raise UserError(
                f"--config: expected a config file, as {workdir} has no {FILE} of an earlier run"
            )
        return overridden(own, overrides)
    read = read_file(str(config))
    if own is None:
        return overridden(read, overrides)
    now = {override.removeprefix("--config.").partition("=")[0] for override in overrides}
    remembered = _remember(read, own)
    read = overridden(read, overrides)
    _refuse_contradictions(read, own, now, config, workdir)
    said = [f"{key}={remembered[key]}" for key in sorted(set(remembered) - now)]
    if said:
        more = f" and {len(said) - SAID} more" if len(said) > SAID else ""
        print(f"remembered by {workdir}/{FILE}: {' '.join(said[:SAID])}{more}")
    return read


def command_config(args: argparse.Namespace, command: str) -> ConfigDict:
    """The checked config of a command with the arguments of `add_config_arguments`.

    Raises:
        UserError: see `run_config` and `config_checks`.
    """
    import jax

    if args.workdir is None:
        raise UserError("--workdir: expected a folder, where everything goes")
    config = run_config(args.config, args.workdir, args.overrides)
    source = args.config or epath.Path(args.workdir) / FILE
    config_checks.check_command(config, command, source)
    if command != "evaluate":
        for line in config_counts.settle(config, command, jax.device_count()):
            print(line)
    config_checks.check(config, command, source)
    if command in ("train", "pretrain"):
        config_checks.check_batches(config, jax.device_count())
    return config


@contextlib.contextmanager
def remembered(workdir: epath.PathLike, config: ConfigDict) -> Iterator[None]:
    """Around a run's work: the workdir remembers the config from before the first work on, and
    what later commands were given once they have ended well. A first run that is refused before
    anything was made leaves no trace.

    Raises:
        UserError: the workdir cannot be written.
    """
    from hyperlora_jax.parallel import multihost
    from hyperlora_jax.train.loop import open_workdir

    there = epath.Path(workdir).exists()
    path = open_workdir(workdir)
    first = not (path / FILE).exists()
    if first and multihost.is_first():
        _write(path, config)
    try:
        yield
    except UserError:
        if first and multihost.is_first():
            _forget(path, keep_folder=there)
        raise
    if multihost.is_first():
        _write(path, config)


def _remember(theirs_config: ConfigDict, own: ConfigDict) -> Json:
    """Sets what earlier command lines said, and what the file leaves open, to the workdir's
    values; returns the former."""
    theirs, values = flatten(theirs_config), flatten(own)
    before: tuple[str, ...] = own.get(GIVEN, ())
    given = {key: values[key] for key in before if key in values and key in theirs}
    open_keys = {
        key: values[key] for key, value in theirs.items() if value is None and key in values
    }
    for key, value in {**open_keys, **given}.items():
        *sections, last = key.split(".")
        node = theirs_config
        for section in sections:
            node = node[section]
        with node.ignore_type():
            node[last] = value
    theirs_config[GIVEN] = tuple(sorted(given))
    return given


def _refuse_contradictions(
    read: ConfigDict,
    own: ConfigDict,
    now: set[str],
    config: epath.PathLike,
    workdir: epath.PathLike,
) -> None:
    root = epath.Path(workdir)
    trained = (root / "checkpoints").exists() or (root / "hypernetwork").exists()
    before = flatten(own)
    for key, value in flatten(read).items():
        parts = key.split(".")
        matters = key in PICTURES or (trained and parts[0] in TRAINED)
        if matters and key in before and before[key] != value and key not in now:
            raise UserError(
                f"{key}: {workdir} was begun with {before[key]!r}, --config {config} has "
                f"{value!r}; leave out --config, give --config.{key} too, or take another workdir"
            )


def _with_tuples(value: object) -> object:
    """JSON has no tuples, configs no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _write(path: epath.Path, config: ConfigDict) -> None:
    """Keeps what the training loop has written beside the config."""
    file = path / FILE
    before = json.loads(file.read_text()) if file.exists() else {}
    content = {**before, "config": config.to_dict()}
    storage.replaced(file, json.dumps(content, indent=1).encode())


def _forget(path: epath.Path, keep_folder: bool) -> None:
    if any((path / name).exists() for name in MADE):
        return
    (path / FILE).unlink(missing_ok=True)
    if not keep_folder and not any(path.iterdir()):
        path.rmdir()
