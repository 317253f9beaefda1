"""A folder per subject: pictures, and optionally captions and roles (`captions.py`).

    concepts/
      anna/  1.jpg 2.png metadata.jsonl      {"file_name": "1.jpg", "role": "reference"}
      bert/  a.webp a.txt b.webp b.txt
      metadata.jsonl                         {"file_name": "anna/2.png", "text": "a photo of sks"}

This is the only listing of pictures: for train, distill, refine, generate and evaluate. Without
metadata every picture is a reference and a target. A row may also carry "identity" (the same for
all rows of a folder), when several folders show one identity. What is left out is said in one line.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import NamedTuple

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import captions, folder_listing, pictures, size_buckets
from hyperlora_jax.pictures.captions import Row
from hyperlora_jax.pictures.concepts import Concept
from hyperlora_jax.pictures.folder_listing import Listing, list_folder
from hyperlora_jax.pictures.pictures import load_image
from hyperlora_jax.pictures.size_buckets import Size
from hyperlora_jax.pictures.subjects import Subject


class PictureFile(NamedTuple):
    """One picture of a subject: its path, caption ("" = none given) and role."""

    path: str  # of hundreds of thousands of files a restart makes no Path
    caption: str
    role: str


@dataclasses.dataclass(frozen=True)
class SubjectFolder:
    """The pictures of one subject.

    Attributes:
        path: the folder. identity: who is shown.
        files: its pictures, by name.
        left_out: names of files in it that mean nothing here.
        unread: keys of its metadata that mean nothing here.
    """

    path: Path
    identity: str
    files: tuple[PictureFile, ...]
    left_out: tuple[str, ...] = ()
    unread: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def of_role(self, role: str) -> list[PictureFile]:
        """Those that are a "reference" or a "target"; UserError when there is none."""
        files = [file for file in self.files if file.role == "both" or file.role == role]
        if not files:
            raise UserError(f"{self.path}: its metadata names no {role} picture")
        return files


def open_image_folder(path: str | Path) -> list[SubjectFolder]:
    """The subjects of a folder, sorted by name. A folder with pictures in it is one subject.

    Files and folders that are not read are counted in one line on stderr.

    Raises UserError when there is no picture, when pictures and folders of pictures lie at one
    level, and naming the file for wrong metadata.
    """
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path}: {found}, expected a folder of concepts")
    top = list_folder(path)
    below = {name: list_folder(os.path.join(path, name)) for name in top.folders}  # noqa: PTH118
    full = {name: listing for name, listing in below.items() if listing.pictures}
    if top.pictures and full:
        raise UserError(
            f"{path}: holds {_some(top.pictures, 'picture')} beside "
            f"{_some(full, 'folder')} of pictures "
            f"(first {next(iter(full))!r}); expected the pictures of one subject, or a folder each"
        )
    if not top.pictures and not full:
        raise UserError(f"{path}: {_no_pictures(path, top, below)}")
    rows = _rows(path, top)
    if top.pictures:
        subjects = [_subject(path, top, rows)]
        inside = folder_listing.pictures_below(path, top.folders)
        notes = _not_read(subjects, (), inside, _without(top.folders, inside))
        notes += _metadata_above(subjects[0])
    else:
        shared = _by_folder(path, rows, full)
        subjects = [
            _subject(path / name, listing, [*_rows(path / name, listing), *shared[name]])
            for name, listing in full.items()
        ]
        inside = [
            f"{name}/{way}"
            for name, listing in below.items()
            if listing.folders
            for way in folder_listing.pictures_below(path / name, listing.folders)
        ]
        empty = [name for name in below if name not in full]
        files = [name for name in top.others if name not in captions.FILES]
        files += [file for name in empty for file in below[name].others]
        nested = [f"{name}/{folder}" for name in full for folder in below[name].folders]
        empty += _without(nested, inside)
        notes = _not_read(subjects, files, inside, empty)
    if notes:
        print(f"note: {path}: not read: {'; '.join(notes)}", file=sys.stderr)
    return subjects


def read_folder(folder: str | Path) -> SubjectFolder:
    """The pictures of a folder as one subject; UserError when it has none."""
    folder = Path(folder)
    listing = list_folder(folder)
    if not listing.pictures:
        expected = " ".join(pictures.SUFFIXES)
        raise UserError(f"{folder}: has no pictures, expected at least one of {expected}")
    return _subject(folder, listing, _rows(folder, listing))


def read_concept(
    folder: str | Path | SubjectFolder, buckets: Sequence[Size], default_caption: str = ""
) -> Subject:
    """The subject of a concept folder; see `open_concept`.

    Raises UserError naming the file for unreadable pictures.
    """
    return open_concept(folder, buckets, default_caption).load()


def open_concept(
    folder: str | Path | SubjectFolder, buckets: Sequence[Size], default_caption: str = ""
) -> Concept:
    """The concept of a folder, its pictures upright, all cut to the bucket nearest to the median
    shape of its targets. Of several buckets the files' headers decide; pictures are not read yet.

    Raises UserError naming the file for wrong metadata, and folders without a reference or without
    a target.
    """
    own = folder if isinstance(folder, SubjectFolder) else read_folder(folder)
    references, targets = own.of_role("reference"), own.of_role("target")
    size = buckets[0]
    if len(buckets) > 1:
        size = size_buckets.nearest((pictures.upright_size(f.path) for f in targets), buckets)
    captions_of = tuple(f.caption or default_caption for f in targets)

    def load() -> Subject:
        encoded = {f.path: pictures.encode_png(load_image(f.path, size)) for f in own.files}
        return Subject(
            id=own.name,
            identity=own.identity,
            references=tuple(encoded[f.path] for f in references),
            targets=tuple(encoded[f.path] for f in targets),
            captions=captions_of,
        )

    return Concept(
        own.name,
        own.identity,
        captions_of,
        size,
        "",
        load,
        lambda: [load_image(file.path, size) for file in targets],
        len(references),
        lambda seen: [load_image(file.path, seen) for file in references],
        references != targets,
        files=tuple((file.path, file.role) for file in own.files),
    )


def _rows(folder: Path, listing: Listing) -> list[Row]:
    return captions.read_rows(folder, (*listing.others, *listing.folders))


def _by_folder(root: Path, rows: Sequence[Row], folders: Iterable[str]) -> Mapping[str, list[Row]]:
    """Rows of the metadata above the subjects' folders, "anna/1.jpg", by folder, less "anna/"."""
    by_name: dict[str, list[Row]] = {name: [] for name in folders}
    plain = {captions.plain(name): name for name in by_name} if rows else {}
    for row in rows:
        first, _, rest = captions.plain(row.file_name).partition("/")
        if first not in plain or not rest:
            raise UserError(
                f"{row.where}: file_name {row.file_name!r} is no picture of a folder of {root}"
            )
        by_name[plain[first]].append(dataclasses.replace(row, file_name=rest))
    return by_name


def _subject(folder: Path, listing: Listing, rows: Sequence[Row]) -> SubjectFolder:
    matched = captions.match(rows, listing.pictures, folder)
    start = os.path.join(folder, "")  # noqa: PTH118
    named = {row.identity for row in matched.values() if row.identity is not None}
    if len(named) > 1:
        raise UserError(
            f"{folder}: its metadata names the identities {sorted(named)}, expected one per folder"
        )
    others = set(listing.others)
    texts = {name: captions.beside(name, others) for name in listing.pictures}
    files = []
    for name in listing.pictures:
        row, text = matched.get(name), texts[name]
        caption = None if row is None else row.caption
        if text is not None:
            written = captions.read_beside(folder / text)
            if caption is not None and caption != written:
                raise UserError(
                    f"{folder / text}: another caption than that of {row.where if row else ''}"
                )
            caption = written
        files.append(PictureFile(start + name, caption or "", row.role if row else "both"))
    return SubjectFolder(
        folder,
        named.pop() if named else folder.name,
        tuple(files),
        tuple(sorted(others - set(captions.FILES) - set(texts.values()))),
        frozenset(key for row in rows for key in row.unread),
    )


def _not_read(
    subjects: Sequence[SubjectFolder],
    files: Iterable[str],
    inside: Sequence[str],
    empty: Sequence[str],
) -> list[str]:
    """Parts of the line that says what was left out."""
    parts = []
    files = [*files, *(name for subject in subjects for name in subject.left_out)]
    if files:
        counts = folder_listing.counted(files) + folder_listing.way_out(files)
        parts.append(f"{_some(files, 'file')} ({counts})")
    if inside:
        parts.append(f"{_some(inside, 'folder')} of pictures further below (first {inside[0]!r})")
    if empty:
        parts.append(f"{_some(empty, 'folder')} without a picture (first {empty[0]!r})")
    if keys := sorted(set().union(*(subject.unread for subject in subjects))):
        parts.append(f"keys of the metadata: {', '.join(keys)}")
    return parts


def _without(folders: Iterable[str], inside: Sequence[str]) -> list[str]:
    """Folders that no way to pictures leads through."""
    return [name for name in folders if not any(f"{way}/".startswith(f"{name}/") for way in inside)]


def _some(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _metadata_above(subject: SubjectFolder) -> list[str]:
    """The metadata file that a subject's folder may have meant, when it has no captions itself."""
    if any(file.caption for file in subject.files):
        return []
    above = subject.path.absolute().parent
    return [
        f"{above / name}, one folder above" for name in captions.FILES if (above / name).is_file()
    ]


def _no_pictures(path: Path, top: Listing, below: Mapping[str, Listing]) -> str:
    kinds = " ".join(pictures.SUFFIXES)
    if deeper := folder_listing.pictures_below(path, below):
        return f"its pictures lie deeper, expected them one folder below (found {deeper[0]!r})"
    others = [name for listing in (top, *below.values()) for name in listing.others]
    found = f"no picture, but {folder_listing.counted(others)}" if others else "empty"
    way_out = folder_listing.way_out(others)
    return f"{found}, expected a folder per concept with pictures ({kinds}){way_out}"
