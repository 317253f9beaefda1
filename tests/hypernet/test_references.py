import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.references import SubjectPolicy, read_reference, read_references


def save(path, pixels):
    Image.fromarray(np.uint8(pixels)).save(path)
    return path


def test_square_picture_is_kept(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    image = read_reference(save(tmp_path / "a.png", pixels))
    np.testing.assert_allclose(image, pixels / 255.0, atol=1e-6)


def test_centre_crop_resize_and_transparency(tmp_path):
    wide = np.zeros((16, 48, 4))
    wide[:, 16:32] = (255, 0, 0, 255)
    wide[:, 24:] = 0
    image = read_reference(save(tmp_path / "a.png", wide), size=8)
    assert image.shape == (8, 8, 3)
    np.testing.assert_allclose(image[4, 1], (1, 0, 0), atol=0.02)
    np.testing.assert_allclose(image[4, 6], (1, 1, 1), atol=0.02)


def test_whole_factors_stay_crisp(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    path = save(tmp_path / "a.png", pixels.repeat(4, axis=0).repeat(4, axis=1))
    np.testing.assert_allclose(read_reference(path, size=8), pixels / 255.0, atol=1e-6)


def test_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_reference(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a folder"):
        read_reference(tmp_path)
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_reference(tmp_path / "a.png")
    with pytest.raises(UserError, match="4x9 pixels, expected at least 8x8"):
        read_reference(save(tmp_path / "b.png", np.zeros((9, 4, 3))))
    with pytest.raises(UserError, match="none given"):
        read_references([], 8)


def test_truncated_picture_is_refused(tmp_path):
    whole = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    (tmp_path / "b.png").write_bytes(whole.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_reference(tmp_path / "b.png")


def test_subject_policy(tmp_path):
    pixels = np.zeros((40, 60, 3))
    pixels[4:24, 38:58] = 255
    path = save(tmp_path / "a.png", pixels)
    box = np.array([[38.0, 4.0, 58.0, 24.0]])
    found = read_reference(path, policy=SubjectPolicy(lambda _: box, smallest_side=16, margin=0.0))
    assert found.shape == (20, 20, 3) and found.min() == 1.0
    grown = read_reference(path, policy=SubjectPolicy(lambda _: box, smallest_side=16, margin=0.5))
    assert grown.shape == (30, 30, 3)  # at the border: shifted inwards, never cut
    aligned = read_reference(
        path, policy=SubjectPolicy(lambda _: box, align=lambda x, _: x[:10, :10], smallest_side=9)
    )
    assert aligned.shape == (10, 10, 3)
    for boxes, message in (
        (np.zeros((0, 4)), "found no subject"),
        (np.concatenate([box, box]), "found 2 subjects"),
        (box, "subject is 20 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            read_reference(path, policy=SubjectPolicy(lambda _, b=boxes: b, smallest_side=21))
