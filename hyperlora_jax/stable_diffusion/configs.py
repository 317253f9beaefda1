"""Strict reading of the config.json files of diffusers and transformers.

Every key must be known. A key of `fixed` may hold one of the listed values or null; any other value
would change what the model computes, and is an error that names it. Keys that start with "_" and
keys that do not affect the arithmetic are ignored.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from hyperlora_jax.errors import UserError

Config = Mapping[str, Any]
_LEAST, _MOST = 1e-12, 2**24
# What may be a list of one number per level, and of lists for a level's layers.
_NESTED = frozenset({"transformer_layers_per_block", "reverse_transformer_layers_per_block"})
_LISTS = frozenset(
    {
        "layers_per_block", "attention_head_dim", "cross_attention_dim", "only_cross_attention",
        "sample_size", "latents_mean", "latents_std",
    }
)  # fmt: skip
_MAY_BE_ZERO = frozenset(
    {
        "freq_shift", "eos_token_id", "transformer_layers_per_block", "shift_factor",
        "reverse_transformer_layers_per_block",
    }
)  # fmt: skip
_FLOATS = frozenset({"latents_mean", "latents_std", "shift_factor", "freq_shift"})
_ANY_NUMBER = frozenset({"latents_mean", "shift_factor"})


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
            values[key] = _checked(value, defaults[key], key, what)
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


def _checked(value: Any, default: Any, key: str, what: str) -> Any:
    """The value, when it is of the default's type; or a tuple of such, where there may be one for
    every level. Numbers without a default are sizes."""
    if value is None:
        return default
    like = default[0] if isinstance(default, tuple) else default
    deepest = 2 if key in _NESTED else 1 if key in _LISTS else 0
    least, most = (1, 1) if isinstance(default, tuple) else (0, deepest)
    good = (
        value != ()
        and least <= _depth(value) <= most
        and all(_fits(leaf, like, key) for leaf in _leaves(value))
    )
    if not good:
        kind = {bool: "true or false", str: "a text"}.get(type(like), "a size or a list of sizes")
        raise UserError(f"{what} config: {key} = {value!r:.80} is no value for it, expected {kind}")
    return value


def _fits(leaf: Any, like: Any, key: str) -> bool:
    if isinstance(like, bool | str) or (like is None and isinstance(leaf, str)):
        return like is None or type(leaf) is type(like)
    if isinstance(leaf, bool) or not isinstance(leaf, int | float):
        return False
    if key in _ANY_NUMBER:
        return math.isfinite(leaf)
    whole = isinstance(leaf, int) or isinstance(like, float) or key in _FLOATS
    return whole and (0 if key in _MAY_BE_ZERO else _LEAST) <= leaf <= _MOST


def _depth(value: Any) -> int:
    return 1 + max(map(_depth, value), default=0) if isinstance(value, tuple) else 0


def _leaves(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, tuple) else (value,):
        yield from _leaves(item) if isinstance(item, tuple) else (item,)


def check_divides(number: int, size: int, key: str, sizes: str, what: str) -> None:
    """Raises UserError unless `number` (of the config's `key`) divides a size of its `sizes`."""
    if size % number:
        raise UserError(f"{what} config: {key} {number} does not divide {size} of {sizes}")


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
