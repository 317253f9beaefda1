"""What is said of pictures beside them: metadata.jsonl, metadata.csv, and a text file per picture.

    metadata.jsonl    {"file_name": "1.jpg", "text": "a photo of sks person", "role": "reference"}
    metadata.csv      file_name,caption
    1.txt, 1.caption  the first line is the caption of 1.jpg

A caption's key is text, caption or prompt. `file_name` is relative to the metadata file's folder.
"""

import csv
import dataclasses
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError

FILES = ("metadata.jsonl", "metadata.csv")
BESIDE = (".txt", ".caption")
CAPTIONS = ("text", "caption", "prompt")
ROLES = ("reference", "target", "both")
MARKS = (  # of UTF-32 before those of UTF-16, which begin alike
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a metadata file says of one picture.

    Attributes:
        where: file and line, for messages.
        file_name: as it stands there.
        caption: None where nothing is said.
        role: see `ROLES`.
        identity: None where nothing is said.
        unread: its keys that mean nothing here.
    """

    where: str
    file_name: str
    caption: str | None = None
    role: str = "both"
    identity: str | None = None
    unread: tuple[str, ...] = ()


def read_rows(folder: Path, names: Iterable[str]) -> list[Row]:
    """The rows of the metadata files among `names`, the names in `folder`.

    Raises UserError naming file and line for what is no row, and for unknown roles.
    """
    rows = []
    for name in names:
        if name in FILES:
            path = folder / name
            if path.is_dir():
                raise UserError(f"{path}: is a folder, expected a file with a row per picture")
            text = read_text(path)
            lines = _json_lines(text, path) if name.endswith("l") else _csv_lines(text, path)
            rows += [_row(where, given) for where, given in lines]
    return rows


def match(rows: Sequence[Row], names: Iterable[str], folder: Path) -> dict[str, Row]:
    """The rows by the names of the pictures in `folder` that they are about ("1.jpg", or
    "anna/1.jpg" for rows of the folder above).

    Raises UserError for rows of no picture and for two rows of one picture.
    """
    if not rows:
        return {}
    names = list(names)
    exact = {name: name for name in names}
    same = {plain(name): name for name in names}
    by_name: dict[str, Row] = {}
    for row in rows:
        name = exact.get(row.file_name) or same.get(plain(row.file_name))
        if name is None:
            raise UserError(
                f"{row.where}: file_name {row.file_name!r} is no picture of this folder ({folder})"
            )
        if name in by_name:
            raise UserError(
                f"{row.where}: a second row for {row.file_name!r}, the first is "
                f"{by_name[name].where}"
            )
        by_name[name] = row
    return by_name


def beside(picture: str, names: Iterable[str]) -> str | None:
    """The text file among `names` that belongs to a picture, by name."""
    stem = picture.rpartition(".")[0]
    return next((stem + suffix for suffix in BESIDE if stem + suffix in names), None)


def read_beside(path: Path) -> str:
    """The caption in a text file: its first line that is not empty."""
    lines = (line.strip() for line in re.split(r"\r\n|\n|\r", read_text(path)))
    return next(filter(None, lines), "")


def read_text(path: Path) -> str:
    """A text file in UTF-8, or with a byte order mark in UTF-16; UserError for anything else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        where = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{where}: found byte 0x{content[error.start]:02x}, which is not "
            f"{'UTF-8' if encoding.startswith('utf-8') else encoding}; save the file as UTF-8"
        ) from None


def plain(name: str) -> str:
    """One spelling of a path: separators, "./", and accents as one character."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name.replace("\\", "/"))))


def _json_lines(text: str, path: Path) -> Iterator[tuple[str, Json]]:
    # Not splitlines(): captions may hold U+2028 and U+0085.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or "file_name" not in row:
                raise UserError(f'{where}: expected a JSON object with "file_name"')
            yield where, row


def _csv_lines(text: str, path: Path) -> Iterator[tuple[str, Json]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if "file_name" not in row:
                raise UserError(f"{path}: has the columns {list(row)}, expected file_name")
            if None in row or None in row.values():
                raise UserError(f"{where}: has another number of fields than the first line")
            if not row["file_name"]:
                raise UserError(f"{where}: file_name is empty, expected a picture's name")
            yield where, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: cannot be read ({error})") from None


def _row(where: str, given: Json) -> Row:
    for key in ("file_name", *CAPTIONS, "role", "identity"):
        if not isinstance(given.get(key, ""), str):
            raise UserError(f"{where}: {key} is {given[key]!r}, expected a text")
    if given.get("role", "both") not in ROLES:
        raise UserError(f"{where}: role {given['role']!r}, expected one of {', '.join(ROLES)}")
    caption = next((key for key in CAPTIONS if key in given), None)
    read = {"file_name", caption, "role", "identity"}
    return Row(
        where,
        given["file_name"],
        None if caption is None else given[caption],
        given.get("role", "both"),
        given.get("identity"),
        tuple(key for key in given if key not in read),
    )
