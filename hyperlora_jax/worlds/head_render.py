"""Draws a head: triangles to pixels, with light, in NumPy alone.

The pixels in the bounding box of every triangle that faces the camera are listed; of those inside a
triangle the nearest to the camera stays (z buffer), and only those are lit:

    colour · (ambient + (1 - ambient) · max(0, n · l)) + shine · max(0, n · h)^24
"""

import dataclasses

import numpy as np

from hyperlora_jax.array_types import Bool, Float, Int, UInt8

SUPERSAMPLING = 2  # pixels per side that are averaged into one
CAMERA = 14.0  # decimetres from the origin
ZOOM = 0.48  # share of the picture's side that a decimetre takes at the origin
CENTRE = (0.5, 0.48)  # where the origin is drawn, shares of width and height
SHINE, SHARPNESS = 0.12, 24
TOLERANCE = 1e-4  # of barycentric coordinates, so that no seam stays open


@dataclasses.dataclass(frozen=True)
class Light:
    """Where light comes from: degrees to the left (-) or right and up, and the ambient share."""

    azimuth: float
    elevation: float
    ambient: float

    @property
    def direction(self) -> Float[np.ndarray, "3"]:
        """Unit vector towards the light; x to the right, y up, z to the camera."""
        a, e = np.deg2rad([self.azimuth, self.elevation])
        return np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])


def draw(
    points: Float[np.ndarray, "v 3"],
    faces: Int[np.ndarray, "f 3"],
    colours: Float[np.ndarray, "v 3"],
    light: Light,
    background: Float[np.ndarray, "3"],
    size: int,
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a mesh around the origin, size x size pixels.

    Args:
        points: decimetres, x to the right, y up, z towards the camera.
        faces: corners, counter-clockwise seen from outside.
        colours: of every vertex, in [0, 1]; background likewise.
    """
    side = size * SUPERSAMPLING
    picture = np.tile(np.asarray(background, np.float64), (side * side, 1))
    scale = side * ZOOM * CAMERA / (CAMERA - points[:, 2])
    x = CENTRE[0] * side + points[:, 0] * scale
    y = CENTRE[1] * side - points[:, 1] * scale
    face, pixel, weights = visible(np.stack([x, y, points[:, 2]], 1), faces, side)
    corners = faces[face]
    normals = np.einsum("pk,pkd->pd", weights, vertex_normals(points, faces)[corners])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    towards = light.direction
    half = towards + np.array([0.0, 0.0, 1.0])
    lit = light.ambient + (1 - light.ambient) * np.maximum(normals @ towards, 0.0)
    shine = SHINE * np.maximum(normals @ (half / np.linalg.norm(half)), 0.0) ** SHARPNESS
    albedo = np.einsum("pk,pkd->pd", weights, colours[corners])
    picture[pixel] = np.clip(albedo * lit[:, None] + shine[:, None], 0.0, 1.0)
    blocks = picture.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3)
    return (blocks.mean(axis=(1, 3)) * 255.0 + 0.5).astype(np.uint8)


def visible(
    projected: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"], side: int
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Float[np.ndarray, "p 3"]]:
    """(triangle, pixel number y · side + x, barycentric coordinates) of every covered pixel.

    Args:
        projected: x and y in pixels, and z, larger is nearer.
    """
    corners = projected[faces]
    (ax, ay), (bx, by), (cx, cy) = (corners[:, k, :2].T for k in range(3))
    seen = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax) < 0  # y points down
    # Of pixel centres, at whole numbers and a half.
    low = np.clip(np.ceil(corners[:, :, :2].min(axis=1) - 0.5), 0, side).astype(int)
    high = np.clip(np.floor(corners[:, :, :2].max(axis=1) + 0.5), 0, side).astype(int)
    wide, tall = np.maximum(high - low, 0).T
    counts = wide * tall * seen
    face = np.repeat(np.arange(len(faces)), counts)
    number = np.arange(len(face)) - np.repeat(np.cumsum(counts) - counts, counts)
    x = low[face, 0] + number % np.maximum(wide[face], 1)
    y = low[face, 1] + number // np.maximum(wide[face], 1)
    weights, inside = _barycentric(corners[face], x + 0.5, y + 0.5)
    face, weights, pixel = face[inside], weights[inside], (y * side + x)[inside]
    depth = (weights * corners[face, :, 2]).sum(axis=1)
    order = np.lexsort((depth, pixel))
    nearest = order[np.append(np.diff(pixel[order]) > 0, True)] if len(order) else order
    return face[nearest], pixel[nearest], weights[nearest]


def vertex_normals(
    points: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"]
) -> Float[np.ndarray, "v 3"]:
    """Sums of the normals of the triangles around every vertex, weighted by area."""
    a, b, c = (points[faces[:, k]] for k in range(3))
    normal = np.cross(b - a, c - a)
    flat, count = faces.ravel(), len(points)
    return np.stack(
        [np.bincount(flat, np.repeat(normal[:, d], 3), count) for d in range(3)], axis=1
    )


def _barycentric(
    corners: Float[np.ndarray, "p 3 3"], x: Float[np.ndarray, " p"], y: Float[np.ndarray, " p"]
) -> tuple[Float[np.ndarray, "p 3"], Bool[np.ndarray, " p"]]:
    (ax, ay), (bx, by), (cx, cy) = (corners[:, k, :2].T for k in range(3))
    area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy)
    usable = np.abs(area) > 1e-9
    area = np.where(usable, area, 1.0)
    u = ((by - cy) * (x - cx) + (cx - bx) * (y - cy)) / area
    v = ((cy - ay) * (x - cx) + (ax - cx) * (y - cy)) / area
    weights = np.stack([u, v, 1.0 - u - v], axis=1)
    return weights, usable & (weights > -TOLERANCE).all(axis=1)
