"""Config files (Python modules with `get_config() -> ConfigDict`) and their overrides.

    hyperlora train --config configs/avatars.py --config.train.num_steps=2000

An unknown key or a value of another type is an error that names it.
"""

import ast
import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError

PACKAGE = Path(__file__).parents[1]
# An installed package has the configs inside it, a checkout beside it.
PACKAGED = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())
GIVEN = "given"  # the config's own key for the names of overridden keys


def parent_config(file: str, name: str) -> ConfigDict:
    """get_config() of the config file `name` beside the config `file` (its own __file__), for
    configs that change some values of another."""
    return _get_config(Path(file).with_name(name))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a file with overrides `--config.a.b=value` applied; its keys are locked.

    Its key `given` holds the names of the overridden keys, ("a.b",): what somebody asked for in so
    many words, and no default may change.

    Raises:
        UserError: no such file, no get_config in it, an unknown key, a value of another type.
    """
    return overridden(read_file(path), overrides)


def read_file(path: str | Path) -> ConfigDict:
    """The config of a file as it stands there.

    Raises:
        UserError: no such file, or no get_config in it.
    """
    file = find_file(path)
    try:
        return _with_homes(_get_config(file))
    except Exception as error:
        raise UserError(f"--config {path}: {type(error).__name__}: {error}") from error


def find_file(path: str | Path) -> Path:
    """A config file: a path, or the name of one that comes with the package ("my_pictures").

    Raises:
        UserError: there is no such file.
    """
    file = Path(path).expanduser()
    if file.is_file() and file.suffix == ".py":
        return file
    names = sorted(own.stem for own in PACKAGED.glob("*.py"))
    name = str(path).removesuffix(".py").removeprefix("configs/")
    if str(path) in names:  # even where a folder is called so: `hyperlora demo` makes one
        return PACKAGED / f"{path}.py"
    if file.exists():
        raise UserError(f"--config {path}: expected a Python file")
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"--config {path}: no such file, and none of {', '.join(names)}{hint}")


def overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The config, locked, with overrides applied and their keys added to `given`.

    Raises:
        UserError: an unknown key, a value of another type.
    """
    before: tuple[str, ...] = config.get(GIVEN, ())
    config.lock()
    now = [_apply(config, override) for override in overrides]
    with config.unlocked():
        config[GIVEN] = tuple(sorted({*before, *now}))
    return config


def flatten(config: ConfigDict | Mapping[str, object], prefix: str = "") -> Json:
    """Values of a ConfigDict or dict by dotted name, without `given`; empty sections are values."""
    values: dict[str, object] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, (dict, ConfigDict)) and len(value):
            values |= flatten(value, f"{name}.")
        elif name != GIVEN:
            values[name] = value
    return values


def _get_config(file: Path) -> ConfigDict:
    module_spec = importlib.util.spec_from_file_location(f"hyperlora_config_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None, f"{file} is no Python file"
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config()


def _apply(config: ConfigDict, override: str) -> str:
    """Sets one value; returns the name of its key."""
    name, equals, text = override.removeprefix("--config.").partition("=")
    if not equals:
        raise UserError(f"{override}: expected --config.section.key=value")
    node = config
    parts = name.split(".")
    for depth, part in enumerate(parts):
        there = sorted(set(node) - {GIVEN}) if isinstance(node, ConfigDict) else []
        if part not in there:
            raise UserError(_unknown_key(config, name, depth, there))
        if depth < len(parts) - 1:
            node = node[part]
    last = parts[-1]
    if isinstance(node[last], ConfigDict):
        keys = ", ".join(f"--config.{name}.{key}" for key in sorted(node[last]))
        raise UserError(f"{override}: is a section, expected a key of it ({keys or 'none'})")
    with node.ignore_type():
        node[last] = _converted(name, node[last], text)
    return name


def _converted(name: str, old: object, text: str) -> object:
    """A value from the command line, of the type of the one that it replaces."""
    value = _parse(text)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, tuple) and not isinstance(value, tuple | None):
        value = (value,)
    if isinstance(old, str) and not isinstance(value, str):
        value = text
    value = _with_home(value)
    if old is not None and value is not None and type(value) is not type(old):
        raise UserError(
            f"--config.{name}: got {text!r} ({type(value).__name__}), "
            f"expected {type(old).__name__} as in {old!r}"
        )
    return value


def _unknown_key(config: ConfigDict, name: str, depth: int, keys: Sequence[str]) -> str:
    """What to say of the part `depth` of a key's name."""
    parts = name.split(".")
    where = ".".join(parts[:depth]) or "the config"
    close = difflib.get_close_matches(parts[depth], keys, 1)
    close = [".".join([*parts[:depth], key, *parts[depth + 1 :]]) for key in close]
    if not close:  # the right key in another section
        elsewhere = [key for key in flatten(config) if key.split(".")[-1] == parts[-1]]
        elsewhere.sort(key=lambda key: key.count("."))
        close = elsewhere[:3] or difflib.get_close_matches(name, flatten(config), 1)
    hint = f"; did you mean {' or '.join(f'--config.{key}' for key in close)}?" if close else ""
    return (
        f"--config.{name}: unknown key {parts[depth]!r}, "
        f"{where} has {', '.join(keys) or 'no keys'}{hint}"
    )


def _with_homes(config: ConfigDict) -> ConfigDict:
    """The config with `~` expanded in every value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _with_homes(value)
        elif _with_home(value) != value:
            config[key] = _with_home(value)
    return config


def _with_home(value: object) -> object:
    """A path, or several with commas between them, without `~`."""
    if isinstance(value, tuple):
        return tuple(map(_with_home, value))
    if not isinstance(value, str) or "~/" not in value:
        return value
    parts = [part.strip() for part in value.split(",")]
    if not all(part.startswith("~/") or "~/" not in part for part in parts):
        return value
    return ",".join(_home(part) for part in parts)


def _home(part: str) -> str:
    return str(Path(part).expanduser()) if part.startswith("~/") else part


def _parse(text: str) -> object:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
