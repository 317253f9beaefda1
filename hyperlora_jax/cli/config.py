"""Config files (Python modules with `get_config() -> ConfigDict`) and their overrides.

    hyperlora train --config configs/avatars.py --config.train.num_steps=2000

An unknown key or a value of another type is an error that names it.
"""

import argparse
import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from hyperlora_jax.errors import UserError


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--config FILE and --workdir DIR; overrides are collected by the main program."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=default,
        required=default is None,
        help="config file; single values by --config.section.key=value",
    )
    parser.add_argument("--workdir", metavar="DIR", required=True, help="where everything goes")


def parent_config(file: str, name: str) -> ml_collections.ConfigDict:
    """get_config() of the config file `name` beside the config `file` (its own __file__), for
    configs that change some values of another."""
    return _get_config(Path(file).with_name(name))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of a file with overrides `--config.a.b=value` applied; its keys are locked.

    Raises:
        UserError: no such file, no get_config in it, an unknown key, a value of another type.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--config {path}: no such file")
    if file.suffix != ".py":
        raise UserError(f"--config {path}: expected a Python file")
    try:
        config = _get_config(file)
    except Exception as error:
        raise UserError(f"--config {path}: {type(error).__name__}: {error}") from error
    config.lock()
    for override in overrides:
        _apply(config, override)
    return config


def _get_config(file: Path) -> ml_collections.ConfigDict:
    module_spec = importlib.util.spec_from_file_location(f"hyperlora_config_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None, f"{file} is no Python file"
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config()


def _apply(config: ml_collections.ConfigDict, override: str) -> None:
    name, equals, text = override.removeprefix("--config.").partition("=")
    if not equals:
        raise UserError(f"{override}: expected --config.section.key=value")
    node: Any = config
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            known = sorted(node) if isinstance(node, ml_collections.ConfigDict) else []
            where = ".".join(parts[:depth]) or "the config"
            raise UserError(
                f"--config.{name}: unknown key {part!r}, "
                f"{where} has {', '.join(known) or 'no keys'}"
            )
        if depth < len(parts) - 1:
            node = node[part]
    last = parts[-1]
    old, value = node[last], _parse(text)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, str) and not isinstance(value, str):
        value = text
    if old is not None and value is not None and type(value) is not type(old):
        raise UserError(
            f"--config.{name}: got {text!r} ({type(value).__name__}), "
            f"expected {type(old).__name__} as in {old!r}"
        )
    with node.ignore_type():
        node[last] = value


def _parse(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
