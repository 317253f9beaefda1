"""A config as text: one line a key, with the comment that explains it."""

import argparse
import ast
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from hyperlora_jax.cli import sections
from hyperlora_jax.cli.config import find_file, flatten, load_config
from hyperlora_jax.cli.workdir_config import run_config
from hyperlora_jax.errors import UserError


def of_command(args: argparse.Namespace) -> str:
    """The config that a command with these arguments would have before it looks at pictures.

    Raises:
        UserError: see `run_config`.
    """
    workdir = getattr(args, "workdir", None)
    if args.config is None and workdir is None:
        raise UserError("--print_config: expected --config FILE, or --workdir of a run")
    if workdir is None:
        config = load_config(args.config, args.overrides)
    else:
        config = run_config(args.config, workdir, args.overrides)
    return as_text(config, find_file(args.config) if args.config else None)


def as_text(config: ConfigDict, file: Path | None = None) -> str:
    """`key = value  # comment` for every key; comments are those of `file` and of `sections`."""
    comments = comments_of(Path(sections.__file__).read_text())
    if file is not None:
        comments |= comments_of(file.read_text())
    lines = [f"{key} = {value!r}" for key, value in flatten(config).items()]
    width = max((len(line) for line in lines if len(line) <= 60), default=0)
    return "\n".join(
        f"{line:<{width}}  # {comment}" if (comment := _find(comments, key)) else line
        for line, key in zip(lines, flatten(config), strict=True)
    )


def comments_of(source: str) -> dict[str, str]:
    """Comments behind the keys of all dictionaries of a program, by the dotted path of the key
    within the outermost one, the name of the function around it in front."""
    lines, comments = source.splitlines(), {}
    told: set[int] = set()

    def visit(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Dict):
                read(child, path)
            else:
                visit(child, child.name if isinstance(child, ast.FunctionDef) else path)

    def read(table: ast.Dict, path: str) -> None:
        for key, value in zip(table.keys, table.values, strict=True):
            if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
                continue
            name = f"{path}.{key.value}".removeprefix(".")
            comment = lines[key.lineno - 1][key.end_col_offset or 0 :].partition("  # ")[2]
            if comment and key.lineno not in told:  # of the first key of its line
                comments[name] = comment.strip()
                told.add(key.lineno)
            if isinstance(value, ast.Dict):
                read(value, name)
            else:
                visit(value, name)

    visit(ast.parse(source), "")
    return comments


def _find(comments: Mapping[str, str], key: str) -> str | None:
    """A dictionary may be a section or hold all of them: `get_config.train.num_steps`."""
    drawn = key.replace("data.", "world.", 1)
    names = (f"get_config.{key}", key, drawn)
    return next((comments[name] for name in names if name in comments), None)
