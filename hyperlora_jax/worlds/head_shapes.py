"""What a person looks like, from a number alone; and what an expression does to a face."""

import dataclasses
import functools

import numpy as np

from hyperlora_jax.array_types import Float, Int
from hyperlora_jax.batches import stable_random
from hyperlora_jax.worlds.head_mesh import AGES, EYES, HAIR, PEOPLES, SEXES, TEETH, HeadMesh

SPREAD = 0.42  # standard deviation of a control, 1 = a whole target
EFFORT = 0.7  # of an expression, 1 = as far as the face can go
SKIN = {
    "pale": (0.96, 0.80, 0.69), "fair": (0.90, 0.72, 0.58), "olive": (0.82, 0.62, 0.46),
    "tan": (0.68, 0.48, 0.34), "brown": (0.52, 0.35, 0.24), "dark": (0.36, 0.24, 0.17),
}  # fmt: skip
HAIR_COLOURS = {
    "black": (0.08, 0.06, 0.05), "brown": (0.22, 0.14, 0.08), "chestnut": (0.45, 0.30, 0.15),
    "blond": (0.78, 0.62, 0.34), "red": (0.55, 0.20, 0.10), "grey": (0.72, 0.72, 0.72),
}  # fmt: skip
IRIS = {
    "brown": (0.25, 0.14, 0.07), "blue": (0.22, 0.40, 0.65), "green": (0.25, 0.42, 0.25),
    "grey": (0.45, 0.45, 0.42),
}  # fmt: skip
MOUTH = (0.25, 0.08, 0.08)  # within
CUTS = {"bald": 0.0, "short": 0.07, "thick": 0.25, "long": 0.2}  # thickness in decimetres
CUT_SHARES = (0.1, 0.35, 0.3, 0.25)
PARTS = {"skin": SKIN, "hair": HAIR_COLOURS, "iris": IRIS, "cut": CUTS}
UNITS = {
    "neutral": (),
    "smiling": ("mouthSmileLeft", "mouthSmileRight", "cheekSquintLeft", "cheekSquintRight"),
    "gaping": ("jawOpen",),
    "surprised": ("browInnerUp", "browOuterUpLeft", "browOuterUpRight", "jawOpen"),
    "blinking": ("eyeBlinkLeft", "eyeBlinkRight"),
    "pouting": ("mouthPucker",),
    "frowning": ("mouthFrownLeft", "mouthFrownRight", "browDownLeft", "browDownRight"),
}


@dataclasses.dataclass(frozen=True)
class Person:
    """One person: `number` decides the shape, `classes` (of `PARTS`) the rest."""

    number: int
    classes: tuple[str, ...]

    @property
    def id(self) -> str:
        """Stable name, e.g. "heads/000123"."""
        return f"heads/{self.number:06d}"


def make_person(number: int) -> Person:
    """The person of a number; every class is equally likely, but few are bald."""
    drawn = 1 - _uniforms(number, "classes", len(PARTS))  # in [0, 1)
    skin, hair, iris = (
        list(names)[int(u * len(names))]
        for names, u in zip((SKIN, HAIR_COLOURS, IRIS), drawn, strict=False)
    )
    cut = list(CUTS)[np.searchsorted(np.cumsum(CUT_SHARES)[:-1], drawn[3], side="right")]
    return Person(number, (skin, hair, iris, cut))


def shaped(mesh: HeadMesh, person: Person, expression: str) -> Float[np.ndarray, "v 3"]:
    """Vertices of a person making a face."""
    weights = np.zeros(len(mesh.names), np.float32)
    peoples = -np.log(_uniforms(person.number, "people", len(PEOPLES)))
    peoples = peoples**2 / (peoples**2).sum()  # nearer to one of them than to all
    male, old = _uniforms(person.number, "age and sex", 2)
    for people, share in zip(PEOPLES, peoples, strict=True):
        for sex, of_sex in zip(SEXES, (1 - male, male), strict=True):
            for age, of_age in zip(AGES, (1 - old, old), strict=True):
                weights[mesh.row(f"{people}-{sex}-{age}")] = share * of_sex * of_age
    amounts = SPREAD * _normals(person.number, len(mesh.controls))
    for amount, (minus, plus) in zip(np.clip(amounts, -1, 1), mesh.controls.values(), strict=True):
        weights[list(plus if amount > 0 else minus)] += abs(amount)
    for unit in UNITS[expression]:
        weights[mesh.row(f"unit/{unit}")] = EFFORT
    return mesh.vertices + np.tensordot(weights, mesh.deltas, 1)


def coloured(
    mesh: HeadMesh, points: Float[np.ndarray, "v 3"], person: Person
) -> tuple[Float[np.ndarray, "v 3"], Float[np.ndarray, "v 3"], Int[np.ndarray, "f 3"]]:
    """(points with hair on, colour of every vertex, triangles to draw) of a person."""
    names = dict(zip(PARTS, person.classes, strict=True))
    skin, hair, iris = (
        np.array(table[names[part]])
        for part, table in (("skin", SKIN), ("hair", HAIR_COLOURS), ("iris", IRIS))
    )
    own = _uniforms(person.number, "details", 4)
    skin = np.clip(skin + 0.05 * (own[0] - 0.5), 0, 1)
    colours = np.tile(skin, (len(points), 1))
    colours = _mixed(colours, skin * [0.95, 0.62, 0.60], mesh.lips)
    colours = _mixed(colours, np.array(MOUTH), mesh.mouth)
    colours = _mixed(colours, 0.8 * hair, (0.5 + 0.5 * own[1]) * _brows(mesh))
    centres = [points[mesh.of_part[eye]].mean(axis=0) for eye in EYES]
    for eye, centre in zip(EYES, centres, strict=True):
        colours[mesh.of_part[eye]] = _eye(points[mesh.of_part[eye]] - centre, iris)
    colours[mesh.of_part[TEETH]] = 0.92
    colours[mesh.of_part[HAIR]] = 0.9 * hair
    between = np.mean(centres, axis=0)
    if names["cut"] != "bald":
        grown = _scalp(mesh, points, between, 0.55 + 0.4 * own[2])
        colours = _mixed(colours, hair, grown)
        outward = points - (between + np.array([0.0, 0.3, -0.9]))
        outward /= np.linalg.norm(outward, axis=1, keepdims=True) + 1e-9
        points = points + (CUTS[names["cut"]] * (0.7 + 0.6 * own[3]) * grown)[:, None] * outward
    return points, colours, _drawn(mesh, names["cut"] == "long")


def _mixed(colours: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    return colours * (1 - share[:, None]) + other * share[:, None]


def _eye(offsets: Float[np.ndarray, "n 3"], iris: np.ndarray) -> Float[np.ndarray, "n 3"]:
    forward = offsets[:, 2] / np.linalg.norm(offsets, axis=1).max()
    colours = np.full((len(offsets), 3), 0.93)
    colours[forward > 0.80] = iris
    colours[forward > 0.95] = 0.03
    return colours


def _brows(mesh: HeadMesh) -> Float[np.ndarray, " v"]:
    """Skin that moves most when the brows are raised."""
    raised = sum(mesh.deltas[mesh.row(f"unit/{u}")] for u in UNITS["surprised"][1:3])
    moved = np.linalg.norm(raised, axis=1)
    return np.clip((moved / moved.max() - 0.72) / 0.15, 0, 1)


def _scalp(
    mesh: HeadMesh, points: np.ndarray, between: np.ndarray, hairline: float
) -> Float[np.ndarray, " v"]:
    """Skin above a plane that falls from the hairline (decimetres above the eyes) to the nape."""
    x, y, z = (points - between).T
    del x
    grown = np.clip((y - hairline - 1.15 * (z + 0.35)) / 0.12, 0, 1)
    return np.where((y > -0.75) & mesh.of_part["body"], grown, 0.0)


@functools.lru_cache(maxsize=2)
def _drawn(mesh: HeadMesh, long_hair: bool) -> Int[np.ndarray, "f 3"]:
    """Triangles to draw: all but hair; of long hair what hangs behind, seen from both sides."""
    is_hair = np.array(mesh.part_of) == HAIR
    if not long_hair:
        return mesh.faces[~is_hair]
    eyes = np.mean([mesh.vertices[mesh.of_part[eye]].mean(axis=0) for eye in EYES], axis=0)
    hair = mesh.faces[is_hair]
    hair = hair[mesh.vertices[hair].mean(axis=1)[:, 2] < eyes[2] - 0.75]
    return np.concatenate([mesh.faces[~is_hair], hair, hair[:, ::-1]])


def _uniforms(number: int, what: str, count: int) -> Float[np.ndarray, " n"]:
    seed = int.from_bytes(what.encode().ljust(8)[:8], "big") ^ (number * 0x9E3779B1)
    return stable_random.uniforms(seed % 2**64, np.arange(count))


def _normals(number: int, count: int) -> Float[np.ndarray, " n"]:
    first, second = (_uniforms(number, what, count) for what in ("radius", "angle"))
    return np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
