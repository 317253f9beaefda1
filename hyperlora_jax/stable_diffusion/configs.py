"""Strict reading of the config.json files of diffusers and transformers.

Every key must be known. A key of `fixed` may hold one of the listed values or null; any other value
would change what the model computes, and is an error that names it. Keys that start with "_" and
keys that do not affect the arithmetic are ignored.
"""

import json
from collections.abc import Mapping
from typing import Any

from hyperlora_jax.errors import UserError

Config = Mapping[str, Any]


def read_config(
    config: Config, defaults: Config, fixed: Mapping[str, tuple], ignored: frozenset[str], what: str
) -> dict[str, Any]:
    """Values of `defaults`, overridden by `config`.

    Raises UserError for a key that is in none of the tables, and for a value of a `fixed` key that
    is neither null nor among the supported ones.
    """
    values = dict(defaults)
    for key, value in config.items():
        if key.startswith("_") or key in ignored:
            continue
        value = _tuples(value)
        if key in defaults:
            values[key] = value if value is not None else defaults[key]
        elif key not in fixed:
            raise UserError(f"{what} config: key {key!r} (value {value!r}) is unknown")
        elif value is not None and value not in fixed[key]:
            raise UserError(
                f"{what} config: {key} = {value!r} is not supported, expected one of "
                f"{[*fixed[key], None]}"
            )
    return values


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def per_level(value: Any, num_levels: int, key: str, what: str) -> tuple:
    """A scalar repeated for every level, or the list itself. UserError when its length differs."""
    if not isinstance(value, tuple):
        return (value,) * num_levels
    if len(value) != num_levels:
        raise UserError(f"{what} config: {key} has {len(value)} values, expected {num_levels}")
    return value


def to_json(config: Config) -> str:
    """Hashable form of a config that a module can keep."""
    return json.dumps(dict(config), sort_keys=True)
