"""What lies in a folder of pictures: pictures, folders and the rest, without what systems leave
there (hidden names, AppleDouble files, thumbnails)."""

import collections
import os
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures

SYSTEM = {
    *("@eadir", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "#recycle"),
    *("system volume information", "lost+found"),
}
MASKS = ("-masklabel.png", "-condlabel.png")  # ends of what OneTrainer lays beside pictures
DOUBLE = "._"  # starts the names of what macOS keeps beside the files of other file systems
DEEPEST = 3  # levels below a folder that are searched for pictures that nobody reads


class Listing(NamedTuple):
    """Names in a folder, sorted: pictures, folders, other files (dead links and macOS' AppleDouble
    companions too)."""

    pictures: tuple[str, ...]
    folders: tuple[str, ...]
    others: tuple[str, ...]


def list_folder(folder: str | Path) -> Listing:
    """The names in a folder that are no system's; UserError when it cannot be listed."""
    by_kind: tuple[list[str], list[str], list[str]] = ([], [], [])
    seen, folders, others = by_kind
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name, inside = entry.name, entry.is_dir()
                plain = name.lower()
                double = name.startswith(DOUBLE) and not inside
                if plain in SYSTEM or (name.startswith(".") and not double):
                    continue
                if inside:
                    folders.append(name)
                elif (
                    plain.endswith(pictures.SUFFIXES)
                    and not double
                    and not plain.endswith(MASKS)
                    and entry.is_file()
                ):
                    seen.append(name)
                else:
                    others.append(name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
    return Listing(*(tuple(sorted(names)) for names in by_kind))


def pictures_below(folder: Path, names: Iterable[str], depth: int = DEEPEST) -> list[str]:
    """Those of the sub-folders `names` that hold pictures themselves or further below, each with
    the way to them ("anna/raw")."""
    paths = []
    for name in names:
        inside = list_folder(folder / name)
        if inside.pictures:
            paths.append(name)
        elif depth > 1:
            deeper = pictures_below(folder / name, inside.folders, depth - 1)
            paths += [f"{name}/{way}" for way in deeper[:1]]
    return paths


def counted(names: Iterable[str]) -> str:
    """Files by suffix, the most frequent first: ".heic 3, .psd 1"."""
    kinds = collections.Counter(map(_kind, names))
    return ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())


def way_out(names: Iterable[str]) -> str:
    """What to do about those of the files that are pictures nobody here reads; "" without any."""
    foreign = sorted(pictures.UNREAD & set(map(_kind, names)))
    return f"; save {' '.join(foreign)} as .jpg or .png to have them read" if foreign else ""


def _kind(name: str) -> str:
    if PurePath(name).name.startswith(DOUBLE):
        return "AppleDouble ._*"
    if name.lower().endswith(MASKS):
        return "mask"
    return PurePath(name).suffix.lower() or "no suffix"
