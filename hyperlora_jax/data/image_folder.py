"""A folder per concept: pictures, and optionally metadata.jsonl with captions and roles.

    concepts/
      anna/  1.jpg 2.png metadata.jsonl      {"file_name": "1.jpg", "role": "reference"}
      bert/  a.webp b.webp                   {"file_name": "2.png", "text": "a photo of sks person"}

Without metadata every picture is a reference and a target. A line may also carry "identity" (the
same for all lines of a folder), when several folders show one identity.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from hyperlora_jax import storage
from hyperlora_jax.data import pictures, size_buckets
from hyperlora_jax.data.concepts import Concept
from hyperlora_jax.data.pictures import load_image
from hyperlora_jax.data.size_buckets import Size
from hyperlora_jax.data.subjects import Subject
from hyperlora_jax.errors import UserError

ROLES = ("reference", "target", "both")

__all__ = [
    "ROLES",
    "PictureFile",
    "load_image",
    "open_concept",
    "open_image_folder",
    "read_concept",
]


@dataclasses.dataclass(frozen=True)
class PictureFile:
    """One picture of a concept: its path, prompt ("" = none given) and role."""

    path: Path
    caption: str
    role: str


def open_image_folder(path: str | Path) -> list[Path]:
    """The concept folders of a folder, sorted by name.

    A folder with pictures in it is one concept by itself. Raises UserError when there is neither.
    """
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path}: {found}, expected a folder of concepts")
    concepts = sorted(p for p in path.iterdir() if p.is_dir() and _picture_files(p))
    if concepts:
        return concepts
    if _picture_files(path):
        return [path]
    kinds = " ".join(pictures.SUFFIXES)
    raise UserError(f"{path}: empty, expected a folder per concept with pictures ({kinds})")


def read_concept(folder: str | Path, buckets: Sequence[Size], default_caption: str = "") -> Subject:
    """The subject of a concept folder; see `open_concept`.

    Raises UserError naming the file for unreadable pictures.
    """
    return open_concept(folder, buckets, default_caption).load()


def open_concept(folder: str | Path, buckets: Sequence[Size], default_caption: str = "") -> Concept:
    """The concept of a folder, its pictures upright, all cut to the bucket nearest to the median
    shape of its targets. Of several buckets the files' headers decide; pictures are not read yet.

    Raises UserError naming the file for wrong metadata, and folders without a reference or without
    a target.
    """
    folder = Path(folder)
    files, identity = list_concept(folder)
    references = [f for f in files if f.role in ("reference", "both")]
    targets = [f for f in files if f.role in ("target", "both")]
    for role, chosen in (("reference", references), ("target", targets)):
        if not chosen:
            raise UserError(f"{folder / 'metadata.jsonl'}: names no {role} picture")
    size = buckets[0]
    if len(buckets) > 1:
        size = size_buckets.nearest((pictures.upright_size(f.path) for f in targets), buckets)
    captions = tuple(f.caption or default_caption for f in targets)

    def load() -> Subject:
        encoded = {file.path: pictures.encode_png(load_image(file.path, size)) for file in files}
        return Subject(
            id=folder.name,
            identity=identity,
            references=tuple(encoded[f.path] for f in references),
            targets=tuple(encoded[f.path] for f in targets),
            captions=captions,
        )

    return Concept(
        folder.name,
        identity,
        captions,
        size,
        f"{folder.name} {[_mark(file.path) for file in files]}",
        load,
        lambda: [load_image(file.path, size) for file in targets],
        [f.path for f in references] != [f.path for f in targets],
        files=tuple((file.path, file.role) for file in files),
    )


def _mark(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    # The copy of a file in a bucket is as old as the copy, on every host.
    copied = file.is_relative_to(storage.cache_folder())
    return file.name, status.st_size, 0 if copied else status.st_mtime_ns


def list_concept(folder: Path) -> tuple[list[PictureFile], str]:
    """The pictures of a concept folder with their captions and roles, and its identity."""
    paths = _picture_files(folder)
    if not paths:
        expected = " ".join(pictures.SUFFIXES)
        raise UserError(f"{folder}: has no pictures, expected at least one of {expected}")
    rows = _read_metadata(folder / "metadata.jsonl", {path.name for path in paths})
    identities = {row["identity"] for row in rows.values() if "identity" in row}
    if len(identities) > 1:
        raise UserError(
            f"{folder / 'metadata.jsonl'}: identities {sorted(identities)}, "
            "expected one per concept folder"
        )
    files = []
    for path in paths:
        row = rows.get(path.name, {})
        files.append(PictureFile(path, row.get("text", ""), row.get("role", "both")))
    return files, identities.pop() if identities else folder.name


def _picture_files(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in pictures.SUFFIXES and p.is_file() and not p.name.startswith(".")
    )


def _read_metadata(path: Path, names: set[str]) -> dict[str, dict[str, str]]:
    """Rows of metadata.jsonl by file name; {} without the file."""
    if not path.exists():
        return {}
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            name = row["file_name"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{where}: expected a JSON object with "file_name"') from None
        if name not in names:
            raise UserError(f"{where}: file_name {name!r} is no picture of this folder")
        if row.get("role", "both") not in ROLES:
            raise UserError(f"{where}: role {row['role']!r}, expected one of {', '.join(ROLES)}")
        for key in ("text", "identity"):
            if not isinstance(row.get(key, ""), str):
                raise UserError(f"{where}: {key} is {row[key]!r}, expected a text")
        rows[name] = row
    return rows
