"""The world of fonts: the style set. Who is to be learned is a typeface, what is drawn a letter.

It has identities (fonts), views (a letter or digit, ink and
paper), captions, and for every (font, caption) one exact picture. Families are held out whole, as
bold and regular of one family are near to each other. The user installs the fonts
(tools/install_fonts.sh); any folder of .ttf and .otf files with the 62 letters and digits does.
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hyperlora_jax import storage
from hyperlora_jax.array_types import UInt8
from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds.named_views import SPLITS, NamedView, NamedViews, checked_split

STYLE = "fonts"
SIZE = 32
HELD_OUT_FAMILIES = 0.15  # of each of both reserves
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GLYPHS = {f"small {c}": c for c in LETTERS} | {f"capital {c}": c.upper() for c in LETTERS}
GLYPHS |= {f"digit {name}": str(k) for k, name in enumerate(DIGITS)}
INKS = {
    "black": (20, 20, 20), "red": (200, 40, 40), "green": (30, 130, 60), "blue": (40, 70, 190),
    "purple": (120, 50, 140), "brown": (120, 75, 40),
}  # fmt: skip
PAPERS = {
    "white": (250, 250, 250), "yellow": (250, 225, 120), "pink": (250, 190, 205),
    "mint": (180, 235, 205), "sky": (185, 215, 250), "grey": (205, 205, 205),
}  # fmt: skip
VIEW_PARTS = {"glyph": list(GLYPHS), "ink": list(INKS), "paper": list(PAPERS)}
OVERSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class Font:
    """One typeface: its file in the folder, and its family, by which splits are made."""

    file: str
    family: str

    @property
    def id(self) -> str:
        """Stable name, e.g. "fonts/acknowtt.ttf"."""
        return f"{STYLE}/{self.file}"


class Fonts(NamedViews):
    """Fonts, views, captions and pictures; see `NamedViews` for the methods.

    Args:
        size: picture side in pixels; None is 32.
        split_seed: fixes which families and which (glyph, ink) pairs are held out.

    Raises:
        UserError: no folder of fonts.
    """

    style = STYLE
    view_parts = VIEW_PARTS
    reserved = ("glyph", "ink")

    def __init__(self, size: int | None = None, split_seed: int = 0):
        self.size = SIZE if size is None else size
        self.split_seed = split_seed
        if not 8 <= self.size <= 512:
            raise UserError(f"data.size: got {self.size}, letters are drawn at 8 to 512 pixels")
        self.folder = fonts_folder()

    @property
    def licence(self) -> str:
        """The fonts' own."""
        return f"that of the fonts in {self.folder}"

    @property
    def identity_part_names(self) -> dict[str, list[str]]:
        """A font has no named parts."""
        return {}

    def num_identities(self, split: str) -> int:
        """How many fonts a split has; `identity` repeats after that many."""
        return len(self._fonts[checked_split(split)])

    def identity(self, split: str, index: int) -> Font:
        """The index-th font of a split."""
        fonts = self._fonts[checked_split(split)]
        return fonts[index % len(fonts)]

    def identity_parts(self, identity: Font) -> dict[str, int]:
        """None."""
        return {}

    def split_of(self, identity: Font) -> str:
        """The split that a font's family belongs to."""
        place = self.uniform("family", identity.family)
        return (
            "train" if place >= 2 * HELD_OUT_FAMILIES else SPLITS[1 + (place < HELD_OUT_FAMILIES)]
        )

    def caption(self, view: NamedView) -> str:
        """The view's parts in words; the font is not in it."""
        glyph, ink, paper = view.classes
        return f"{glyph} in {ink} on {paper} paper"

    def options(self, identity: Font, view: NamedView) -> dict[str, object]:
        """What `draw` is given; the file's hash, so that a cache knows another file by one name."""
        file = str(self.folder / identity.file)
        return {"file": file, "sha256": _sha256(file)[:16], "view": list(view.classes)}

    @functools.cached_property
    def _fonts(self) -> dict[str, list[Font]]:
        by_split: dict[str, list[Font]] = {split: [] for split in SPLITS}
        for font in usable_fonts(self.folder):
            by_split[self.split_of(font)].append(font)
        for split, fonts in by_split.items():  # not by name: neighbours are of one family
            fonts.sort(key=lambda font: self.uniform("order", split, font.file))
            if not fonts:
                raise UserError(f"{self.folder}: too few font families to hold some out")
        return by_split


def fonts_folder() -> Path:
    """$HYPERLORA_FONTS, or the place where tools/install_fonts.sh puts them.

    Raises:
        UserError: there is no such folder.
    """
    named = os.environ.get("HYPERLORA_FONTS")
    folder = Path(named).expanduser() if named else storage.cache_folder() / "fonts"
    if not folder.is_dir():
        raise UserError(
            f"data.style fonts: {folder} is no folder; install fonts by tools/install_fonts.sh, "
            "or name a folder of .ttf and .otf files in HYPERLORA_FONTS"
        )
    return folder.resolve()


@functools.cache
def usable_fonts(folder: Path) -> tuple[Font, ...]:
    """The fonts below a folder that have all glyphs, by name; one of several equal files.

    Raises:
        UserError: there is none.
    """
    from fontTools.ttLib import TTFont

    fonts, seen = [], set()
    files = sorted(file for kind in ("*.ttf", "*.otf") for file in folder.rglob(kind))
    for file in files:
        if _sha256(str(file)) in seen:
            continue
        seen.add(_sha256(str(file)))
        try:
            with TTFont(file, lazy=True) as font:
                characters = font.getBestCmap() or {}
                family = font["name"].getDebugName(1) or file.stem
        except Exception:  # whatever a damaged file makes fontTools say: it is no usable font
            continue
        if all(ord(c) in characters for c in GLYPHS.values()) and _draws_letters(file):
            fonts.append(Font(str(file.relative_to(folder)), family))
    if not fonts:
        raise UserError(
            f"{folder}: found {len(files)} font files, none with all of {len(GLYPHS)} glyphs"
        )
    return tuple(fonts)


def _draws_letters(file: Path) -> bool:
    """Whether every glyph leaves ink, and a and b are different."""
    font = ImageFont.truetype(str(file), 32)
    masks = [font.getmask(c) for c in GLYPHS.values()]
    return all(mask.getbbox() for mask in masks) and bytes(masks[0]) != bytes(masks[1])


@functools.cache
def _sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@functools.lru_cache(maxsize=512)
def _scaled(file: str, size: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """(font whose capital H is half as tall as `size`, the line on which letters stand)."""
    font = ImageFont.truetype(file, size)
    _, top, _, bottom = font.getbbox("H", anchor="ls")
    wanted = 0.5 * size / max(bottom - top, 1) * size
    return ImageFont.truetype(file, max(4, min(round(wanted), 4 * size))), round(0.72 * size)


def draw(options: dict, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a font's file and the classes of a view: the letter stands on a common line,
    its ink in the middle."""
    glyph, ink, paper = options["view"]
    side = OVERSAMPLING * size
    font, line = _scaled(options["file"], side)
    letter = GLYPHS[glyph]
    left, _, right, _ = font.getbbox(letter, anchor="ls")
    picture = Image.new("RGB", (side, side), PAPERS[paper])
    place = ((side - right - left) / 2, line)
    ImageDraw.Draw(picture).text(place, letter, INKS[ink], font, anchor="ls")
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))
