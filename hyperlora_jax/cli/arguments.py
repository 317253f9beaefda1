"""A command's arguments: parsed without JAX, wrong ones refused in one line, `~` expanded."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from hyperlora_jax import storage
from hyperlora_jax.cli import buckets, config, help_texts, single_files
from hyperlora_jax.errors import UserError
from hyperlora_jax.shipped import HYPERNETWORK, checkpoint_path


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong by a UserError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(message)


def add_output(parser: argparse.ArgumentParser, metavar: str, help: str) -> None:
    """--out, which may still stand behind the input as in older versions."""
    parser.add_argument("--out", metavar=metavar, help=help)
    parser.add_argument("old_out", nargs="?", help=argparse.SUPPRESS)


def add_format(
    parser: argparse.ArgumentParser, choices: Sequence[str] = (), **options: Any
) -> None:
    """--format of what is written (LoRAs unless told otherwise), --to in older versions."""
    from hyperlora_jax.lora_files.writing import FORMATS

    parser.add_argument("--format", "--to", choices=choices or FORMATS, **options)


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError where one of these arguments was given and is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")


def parse(name: str, summary: str, module: ModuleType, given: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command `name`, whose module has `add_arguments`.

    A command with --config also gets `overrides`, its arguments --config.section.key=value.

    Raises:
        UserError: a wrong argument, or an output inside the installed package.
        SystemExit: --help was asked for and has been printed.
    """
    parser = OneLineParser(
        prog=f"hyperlora {name}",
        description=summary,
        epilog=help_texts.below_options(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    takes_config = any(action.dest == "config" for action in parser._actions)
    if takes_config:
        parser.add_argument(
            "--print_config", action="store_true", help="print the whole config and end"
        )
        single_files.add_arguments(parser)
    args, rest = parser.parse_known_args(list(given))
    notes = _translate(args, given, rest)
    values = vars(args)
    for key, value in values.items():
        values[key] = _expanded(value)
        if key in ("checkpoint", "workdir", "path") and name != "demo":
            values[key] = _named(values[key])
    if takes_config:
        args.overrides = [item for item in rest if item.startswith("--config.")]
        rest = [item for item in rest if not item.startswith("--config.")]
    if rest:
        raise UserError(_unknown(rest[0], args, name, parser))
    buckets.check(args)
    if takes_config and args.config:  # a typo in a key is named before JAX is there
        base = config.load_config(args.config, args.overrides).get("base")
        if isinstance(base, str):
            single_files.keep_options(base, args)
    for output in ("out", "workdir", "json", "sheet"):
        if values.get(output) and not (name == "export" and output == "workdir"):
            storage.outside_package(values[output], f"--{output}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return args


def _translate(args: argparse.Namespace, given: Sequence[str], rest: list[str]) -> list[str]:
    """Words of older versions mean what they did; the new ones are named, a line each."""
    notes = []
    if any(word.partition("=")[0] == "--to" for word in given):
        notes.append("--to is called --format now")
    if not hasattr(args, "old_out"):
        return notes
    if args.old_out is None and len(rest) == 1 and not rest[0].startswith("-"):
        args.old_out = rest.pop()  # it stood behind an option
    if args.old_out is not None:
        if args.out is not None:
            raise UserError(f"two outputs: {args.old_out} and --out {args.out}, expected one")
        args.out = args.old_out
        notes.append(f"the output is named by --out {args.out} now")
    if args.out is None:
        raise UserError("the following arguments are required: --out")
    delattr(args, "old_out")
    return notes


def _expanded(value: object) -> object:
    """`~` at the start of an argument, as a shell does it where it stands alone."""
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    home = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return str(Path(value).expanduser()) if home else value


def _named(value: object) -> object:
    """The shipped checkpoint's folder for its name, the workdir inside of one of `hyperlora demo`;
    other values as they are."""
    if value == HYPERNETWORK:
        return str(checkpoint_path(value))
    if isinstance(value, str) and value and Path(value, "run", "hypernetwork").is_dir():
        return str(Path(value, "run"))
    return value


def _unknown(
    argument: str, args: argparse.Namespace, command: str, parser: argparse.ArgumentParser
) -> str:
    """What to say of an argument that nobody takes."""
    overrides = getattr(args, "overrides", None)
    if overrides is None or not argument.startswith("--"):
        bare = [item for item in overrides or () if "=" not in item]
        if bare and not argument.startswith("-"):
            return f"{bare[0]} {argument}: use {bare[0]}={argument}"
        return f"unknown argument {argument!r}{_did_you_mean(argument, parser)}"
    key, equals, value = argument.removeprefix("--").partition("=")
    if key == "workdir":  # a key of that name means something else
        return f"unknown argument {argument!r}; {command} reads its --config alone"
    keys: list[str] = []
    if args.config:
        keys = list(config.flatten(config.read_file(args.config)))
    ends = [other for other in keys if other == key or other.endswith(f".{key}")]
    ends.sort(key=lambda other: (other.split(".")[0] != command, other.count(".")))
    if ends:
        return f"unknown argument {argument!r}; use --config.{ends[0]}={value or 'VALUE'}"
    if equals and "." in key:
        return f"unknown argument {argument!r}; values of the config are --config.{argument[2:]}"
    return f"unknown argument {argument!r}{_did_you_mean(argument, parser)}"


def _did_you_mean(argument: str, parser: argparse.ArgumentParser) -> str:
    options = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(argument.partition("=")[0], options, 1)
    return f"; did you mean {close[0]}?" if close else ""
