"""The rasteriser on shapes whose pictures are known."""

import numpy as np

from hyperlora_jax.worlds import head_render
from hyperlora_jax.worlds.head_render import Light

SQUARE = np.array([[0.0, 0, 0], [8, 0, 0], [8, 8, 0], [0, 8, 0]])  # pixels, y down
AWAY = np.array([0.0, 0, 1])
FACING = np.array([[0, 2, 1], [0, 3, 2]])  # counter-clockwise seen from the camera


def test_a_square_covers_every_pixel_once():
    face, pixel, weights = head_render.visible(SQUARE, FACING, 8)
    np.testing.assert_array_equal(np.sort(pixel), np.arange(64))
    assert np.bincount(face).tolist() == [36, 28] or np.bincount(face).tolist() == [28, 36]
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    x = np.einsum("pk,pk->p", weights, SQUARE[FACING[face], 0])
    np.testing.assert_allclose(x, pixel % 8 + 0.5)


def test_nothing_is_seen_from_behind_or_outside():
    for points, faces in ((SQUARE, FACING[:, ::-1]), (SQUARE + 20.0, FACING)):
        assert [len(x) for x in head_render.visible(points, faces, 8)] == [0, 0, 0]


def test_the_nearer_triangle_wins():
    both = np.concatenate([SQUARE + AWAY, SQUARE / 2 + 2 * AWAY])
    faces = np.concatenate([FACING, FACING + 4])
    for order in (faces, faces[::-1]):
        face, pixel, _ = head_render.visible(both, order, 8)
        near = order[face].min(axis=1) >= 4
        np.testing.assert_array_equal(
            np.sort(pixel[near]), [y * 8 + x for y in range(4) for x in range(4)]
        )
        assert len(pixel) == 64


def plate(turn):
    """A plate of 1.6 x 1.6 decimetres around the origin, turned to the right by degrees."""
    a = np.deg2rad(turn)
    flat = 0.8 * np.array([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    return flat @ np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]]).T


def brightness(turn, light):
    colours, faces = np.full((4, 3), 0.5), np.array([[0, 1, 2], [0, 2, 3]])
    picture = head_render.draw(plate(turn), faces, colours, light, np.array([0.0, 0, 1]), 16)
    assert picture.shape == (16, 16, 3)
    np.testing.assert_array_equal(picture[0, 0], [0, 0, 255])
    return picture[8, 8] / 255.0


def test_light_follows_the_angle():
    soft = head_render.SHINE
    for azimuth, turn in ((60.0, 0.0), (0.0, 50.0), (-60.0, 20.0)):
        found = brightness(turn, Light(azimuth, 0.0, 0.3))
        cosine = max(0.0, np.cos(np.deg2rad(azimuth - turn)))
        expected = 0.5 * (0.3 + 0.7 * cosine)
        assert expected - 0.01 <= found[0] <= expected + soft + 0.01
    lit = brightness(0.0, Light(0.0, 0.0, 0.3))
    np.testing.assert_allclose(lit, 0.5 + soft, atol=0.01)  # straight on: all of the shine


def test_size_follows_the_distance():
    colours, faces = np.ones((4, 3)), np.array([[0, 1, 2], [0, 2, 3]])
    shares = []
    for away in (0.0, -7.0):
        points = plate(0.0) + away * AWAY
        picture = head_render.draw(points, faces, colours, Light(0.0, 0.0, 1.0), np.zeros(3), 64)
        shares.append(np.sqrt((picture[..., 0] > 127).mean()))
    np.testing.assert_allclose(shares[0], 1.6 * head_render.ZOOM, atol=0.02)
    np.testing.assert_allclose(shares[1] / shares[0], 14 / 21, atol=0.03)
