"""Which parts of a drawn avatar make its identity, and which make one view of it.

A style's drawing library names every part (hair, mouth, ...) and its variants. The table below
says, per style, which parts and colours belong to the *identity* (never named in a caption, what a
LoRA has to carry) and which to the *view* (named in the caption, what the base model draws by
itself). Class names in captions are lower-case letters only, so that a byte-pair vocabulary can
hold each of them as one token (CLIP's pre-tokeniser would split digits off).

Drawings: dicebear-styles; every style keeps its own licence, see `StyleTable.licence`.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from importlib.resources import files

from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds.avatar_table import NAMED_COLORS, TABLE

ABSENT = "no"  # class name of "this part is not drawn"
_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_UNITS += ["eleven", "twelve", "thirteen"]
_UNITS += [stem + "teen" for stem in ("four", "fif", "six", "seven", "eigh", "nine")]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing that varies: a drawn component or a colour, and its classes.

    `values[k]` is what the drawing library is given for class k; None leaves the component out.
    """

    name: str
    option: str
    classes: tuple[str, ...]
    values: tuple[str | None, ...]
    weights: tuple[float, ...]

    @property
    def is_color(self) -> bool:
        """Whether the drawing option is a colour rather than a component's variant."""
        return self.option.endswith("Color")


@dataclasses.dataclass(frozen=True)
class StyleTable:
    """A style's parts by role, the combinations that are held out, and the fixed options."""

    name: str
    size: int
    identity: tuple[Part, ...]
    view: tuple[Part, ...]
    caption: str
    reserved_identity: tuple[str, ...]
    reserved_view: tuple[str, ...]
    fixed: tuple[tuple[str, str | int], ...]
    linked: tuple[tuple[str, str], ...]
    grid: bool
    licence: str


STYLES = tuple(TABLE)


def definition(style: str) -> dict:
    """The drawing library's JSON of one style; UserError where the avatars extra is missing."""
    try:
        import dicebear  # noqa: F401
        import resvg_py  # noqa: F401

        source = files("dicebear_styles").joinpath(f"{style}.json")
    except ImportError as error:
        raise UserError(
            f"avatars: {error.name} is not installed; install the extra: "
            'pip install "hyperlora-jax[avatars]"'
        ) from None
    return json.loads(source.read_text(encoding="utf-8"))


@functools.cache
def load(style: str) -> StyleTable:
    """The table of one style, its classes resolved. Raises UserError on an unknown style."""
    if style not in TABLE:
        raise UserError(f"avatars: unknown style {style!r}, expected one of {', '.join(STYLES)}")
    entry, drawn = TABLE[style], definition(style)
    view = [_part(name, classes, drawn) for name, classes in entry["view"].items()]
    view.append(_part("background", NAMED_COLORS, drawn))
    return StyleTable(
        name=style,
        size=entry.get("size", 64),
        identity=tuple(_part(name, classes, drawn) for name, classes in entry["identity"].items()),
        view=tuple(view),
        caption=entry["caption"],
        reserved_identity=entry["reserved"][0],
        reserved_view=entry["reserved"][1],
        fixed=tuple(entry.get("fixed", {}).items()),
        linked=tuple(entry.get("linked", {}).items()),
        grid=entry.get("grid", False),
        licence=drawn["meta"]["license"]["text"],
    )


def word(name: str) -> str:
    """A class name as one word of lower-case letters: "happy03" -> "happythree"."""

    def spell(match: re.Match) -> str:
        number = int(match[0])
        if number < 20:
            return _UNITS[number]
        tens, unit = divmod(number % 100, 10)
        hundreds = _UNITS[number // 100] + "hundred" if number >= 100 else ""
        return hundreds + _TENS[tens] + (_UNITS[unit] if unit else "")

    return re.sub(r"[^a-z]", "", re.sub(r"\d+", spell, name.removeprefix("variant")).lower())


def _part(name: str, entry: str | Mapping | tuple[float, str | Mapping], drawn: Mapping) -> Part:
    absent, classes = entry if isinstance(entry, tuple) else (0.0, entry)
    if isinstance(classes, Mapping):
        named = dict(classes)
    elif name.endswith("Color"):
        named = {value.lstrip("#"): value for value in drawn["colors"][name[:-5]]["values"]}
    else:
        named = {
            word(variant): variant for variant in sorted(drawn["components"][name]["variants"])
        }
    option = "backgroundColor" if name == "background" else name
    weights = ((1.0 - absent) / len(named),) * len(named)
    if absent:
        named, weights = {ABSENT: None, **named}, (absent, *weights)
    return Part(name, option, tuple(named), tuple(named.values()), weights)
