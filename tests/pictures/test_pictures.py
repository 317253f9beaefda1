"""One reader for all: what training, generation and evaluation see of a file."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures


def save(path, width=20, height=12, **options):
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_pictures_are_upright_and_centre_cropped(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees
    turned = pictures.load_image(save(tmp_path / "t.jpg", exif=exif, quality=95))
    assert turned.shape == (20, 12, 3)
    plain = pictures.load_image(save(tmp_path / "p.jpg", quality=95))
    assert np.abs(turned.astype(int) - np.rot90(plain, -1)).max() < 40
    assert pictures.load_image(tmp_path / "p.jpg", 16).shape == (16, 16, 3)


def test_the_centre_of_a_shape_is_cut_without_stretching(tmp_path):
    pixels = np.zeros((8, 40, 3), np.uint8)
    pixels[:, 12:28] = 90  # the centre of twice the height's width
    Image.fromarray(pixels).save(tmp_path / "p.png")
    assert (pictures.load_image(tmp_path / "p.png", (4, 8)) == 90).all()
    assert (np.abs(pictures.load_image(tmp_path / "p.png", (3, 6)) - 90.0) < 10).all()
    assert (pictures.load_image(tmp_path / "p.png", (4, 10))[:, [0, -1]] == 0).all()


def test_transparent_gray_and_palette_pictures_become_rgb(tmp_path):
    clear = np.zeros((8, 9, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (pictures.load_image(tmp_path / "clear.png") == 255).all()
    for mode in ("L", "P", "1", "LA", "I;16"):
        Image.new(mode, (9, 8)).save(tmp_path / "m.png")
        assert pictures.load_image(tmp_path / "m.png").shape == (8, 9, 3)


def test_png_round_trip():
    given = np.random.default_rng(0).integers(0, 255, (7, 9, 3), np.uint8)
    np.testing.assert_array_equal(pictures.decode(pictures.encode_png(given)), given)


def test_bad_pictures_are_named(tmp_path):
    def refuse(name, content, match):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=match):
            pictures.load_image(tmp_path / name)

    whole = save(tmp_path / "whole.png", 64, 64).read_bytes()
    refuse("text.png", b"hello", r"text\.png: found 5 bytes that are no picture")
    refuse("empty.png", b"", r"empty\.png: found an empty file")
    refuse("cut.png", whole[: len(whole) // 2], r"cut\.png: the picture cannot be read")
    with pytest.raises(UserError, match=r"gone\.png: no such picture file"):
        pictures.load_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="is a folder, expected a picture"):
        pictures.load_image(tmp_path)


def test_whole_factors_stay_crisp_and_a_cut_mixes_no_pixels(tmp_path):
    given = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    large = given.repeat(4, axis=0).repeat(4, axis=1)
    uneven = np.pad(large, ((0, 0), (1, 2), (0, 0)))  # the middle begins at half a pixel
    for pixels in (large, uneven):
        Image.fromarray(pixels).save(tmp_path / "a.png")
        np.testing.assert_array_equal(pictures.load_image(tmp_path / "a.png", 8), given)


def test_more_than_eight_bits_are_scaled_and_not_cut_off(tmp_path):
    ramp = np.tile(np.arange(64) * 4, (64, 1))
    deep = [
        (np.uint16(ramp * 257), "g.png"),
        (np.uint16(ramp * 257), "g.tif"),
        (np.int32(ramp * 257), "i.tif"),
        (np.float32(ramp * 257), "f.tif"),
        (np.float32(ramp), "small.tif"),
        (np.float32(ramp) / 255, "unit.tif"),
    ]
    for pixels, name in deep:
        Image.fromarray(pixels).save(tmp_path / name)
        found = pictures.load_image(tmp_path / name)
        np.testing.assert_array_equal(found, np.repeat(ramp[..., None], 3, axis=2), name)
    for wrong, name in ((-1.0, "low.tif"), (np.nan, "nan.tif"), (1e6, "high.tif")):
        pixels = np.float32(ramp)
        pixels[0, 0] = wrong
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: found gray values from .* expected 0 to"):
            pictures.load_image(tmp_path / name)


@pytest.mark.parametrize("mode, colour", [("RGB", (7, 8, 9)), ("L", 7), ("I;16", 1799)])
def test_a_colour_that_stands_for_transparent_becomes_white(tmp_path, mode, colour):
    picture = Image.new(mode, (16, 16), colour)
    picture.paste(Image.new(mode, (8, 16), 0), (0, 0))
    picture.save(tmp_path / "t.png", transparency=colour)
    found = pictures.load_image(tmp_path / "t.png")
    assert (found[:, :8] == 0).all() and (found[:, 8:] == 255).all()


def test_the_first_of_several_frames_counts(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert (np.abs(pictures.load_image(tmp_path / name) - np.array([255.0, 0, 0])) < 4).all()


@pytest.mark.parametrize("block", [b"Exif\0\0MM\xd8*\0\0\0\x08", b"Exif\0\0garbage"])
def test_broken_metadata_says_nothing_of_the_pixels(tmp_path, block):
    """Pillow raises SyntaxError for it."""
    picture = Image.new("RGB", (32, 24), (200, 10, 30))
    for name in ("b.webp", "b.png", "b.jpg"):
        picture.save(tmp_path / name, exif=block)
        assert pictures.upright_size(tmp_path / name) == (24, 32)
        assert np.abs(pictures.load_image(tmp_path / name).astype(int) - (200, 10, 30)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_as_pillow_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    np.testing.assert_array_equal(pictures.load_image(tmp_path / "a.png"), wanted)


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"\0\0\0\x18ftypheic", "a HEIC picture"), (b"\xff\x0a", "a JPEG XL picture"),
     (b"\0\0\0\x0cJXL ", "a JPEG XL picture")],
)  # fmt: skip
def test_pictures_that_are_not_read_are_named_with_a_way_out(tmp_path, start, kind):
    (tmp_path / "1.jpg").write_bytes(start + bytes(60))
    with pytest.raises(UserError, match=rf"1\.jpg: {kind}.*save it as \.jpg or \.png"):
        pictures.load_image(tmp_path / "1.jpg")


@pytest.mark.parametrize("width, height", [(1, 1), (3, 2000), (2000, 7)])
def test_pictures_too_small_to_show_anything_are_refused(tmp_path, width, height):
    path = save(tmp_path / "s.png", width, height)
    for size in (None, 16):
        with pytest.raises(UserError, match=rf"has {width}x{height} pixels, expected at least 8x8"):
            pictures.load_image(path, size)


def test_every_suffix_is_read_and_reading_ways_agree(tmp_path):
    encoder = mock.Mock(spec=ImageEncoder, image_size=(8, 16))
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    for suffix in pictures.SUFFIXES:
        (gray := given.convert("L") if suffix == ".pgm" else given).save(tmp_path / f"a{suffix}")
        path = tmp_path / f"a{suffix}"
        found = pictures.reference_pixels(path, encoder)
        assert found.shape == (8, 16, 3), suffix
        for source in (str(path), path.read_bytes(), Image.open(path)):
            np.testing.assert_array_equal(pictures.reference_pixels(source, encoder), found)
        assert pictures.load_image(path).shape == (gray.height, gray.width, 3)


def test_drawn_pictures_become_files_and_pillow_pictures(tmp_path):
    drawn = jnp.linspace(-0.01, 1.01, 2 * 8 * 9 * 3).reshape(2, 8, 9, 3)
    wanted = np.uint8(np.clip(np.asarray(drawn), 0, 1) * 255 + 0.5)
    for one, pixels in zip(pictures.to_pil(drawn), wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(one), pixels)
    np.testing.assert_array_equal(np.asarray(pictures.to_pil(drawn[1])), wanted[1])
    np.testing.assert_array_equal(np.asarray(pictures.to_pil(wanted[0])), wanted[0])
    many = pictures.save_images(tmp_path / "many", drawn)
    assert [path.name for path in many] == ["00.png", "01.png"]
    np.testing.assert_array_equal(pictures.load_image(many[1]), wanted[1])
    assert pictures.save_images(tmp_path / "one.png", drawn[0]) == [tmp_path / "one.png"]
    for paths, match in (
        (["a.png"], "1 paths for 2 pictures"),
        ([tmp_path / "a.what", tmp_path / "b.png"], "a.what: cannot be written"),
    ):
        with pytest.raises(UserError, match=match):
            pictures.save_images(paths, drawn)
    with pytest.raises(UserError, match=r"found shape \[9, 3\]"):
        pictures.to_pil(drawn[0, 0])


def test_a_contact_sheet_shows_all_pictures_magnified():
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    sheet = pictures.contact_sheet(images, 3)
    assert sheet.shape == (2 * 200 + 8, 3 * 200 + 8, 3) and (sheet[:8] == 255).all()
    second_row_third = sheet[208:400, 408:600]
    np.testing.assert_array_equal(second_row_third[::12, ::12], images[5])
    assert pictures.magnified(np.zeros((300, 200, 3), np.uint8)).shape == (300, 200, 3)
