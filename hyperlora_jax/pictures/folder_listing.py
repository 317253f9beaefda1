"""What lies in a folder of pictures: pictures, folders and the rest, without what systems leave
there (hidden names, AppleDouble files, thumbnails)."""

import collections
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path, PurePath

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures

SYSTEM = {
    *("@eadir", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "#recycle"),
    *("system volume information", "lost+found"),
}
DEEPEST = 3  # levels below a folder that are searched for pictures that nobody reads


@dataclasses.dataclass(frozen=True)
class Listing:
    """Names in a folder, sorted: pictures, folders, other files (dead links too)."""

    pictures: tuple[str, ...]
    folders: tuple[str, ...]
    others: tuple[str, ...]


def list_folder(folder: Path) -> Listing:
    """The names in a folder that are no system's; UserError when it cannot be listed."""
    found: dict[str, list[str]] = {"pictures": [], "folders": [], "others": []}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
                    continue
                if entry.is_dir():
                    kind = "folders"
                else:
                    readable = entry.name.lower().endswith(pictures.SUFFIXES)
                    kind = "pictures" if readable and entry.is_file() else "others"
                found[kind].append(entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
    return Listing(**{kind: tuple(sorted(names)) for kind, names in found.items()})


def pictures_below(folder: Path, names: Iterable[str], depth: int = DEEPEST) -> list[str]:
    """Those of the sub-folders `names` that hold pictures themselves or further below, each with
    the way to them ("anna/raw")."""
    found = []
    for name in names:
        inside = list_folder(folder / name)
        if inside.pictures:
            found.append(name)
        elif depth > 1:
            deeper = pictures_below(folder / name, inside.folders, depth - 1)
            found += [f"{name}/{way}" for way in deeper[:1]]
    return found


def counted(names: Iterable[str]) -> str:
    """Files by suffix, the most frequent first: ".heic 3, .psd 1"."""
    kinds = collections.Counter(PurePath(name).suffix.lower() or "no suffix" for name in names)
    return ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
