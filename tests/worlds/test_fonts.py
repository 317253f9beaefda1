"""The world of fonts, on the fonts that matplotlib brings."""

import pathlib
import shutil

import matplotlib
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds import by_style, fonts
from hyperlora_jax.worlds.fonts import GLYPHS, VIEW_PARTS, Fonts, usable_fonts
from hyperlora_jax.worlds.named_views import SPLITS

FOLDER = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(name="world")
def _world(monkeypatch):
    monkeypatch.setenv("HYPERLORA_FONTS", str(FOLDER))
    for seed in range(50):
        world = by_style.open_world("fonts", 24, seed)
        if len({world.split_of(font) for font in usable_fonts(FOLDER)}) == 3:
            return world
    raise AssertionError("no seed with a family in every split")


def test_families_are_in_one_split(world):
    found = {
        split: [world.identity(split, k) for k in range(world.num_identities(split))]
        for split in SPLITS
    }
    families = {split: {font.family for font in own} for split, own in found.items()}
    assert not families["train"] & families["test"]
    assert not families["validation"] & (families["test"] | families["train"])
    assert sum(map(len, found.values())) == len(usable_fonts(FOLDER)) > 8
    assert all(world.split_of(font) == split for split, own in found.items() for font in own)
    assert world.identity("test", 0) == world.identity("test", len(found["test"]))


def test_views_and_captions(world):
    views = world.views("test", 300)
    assert all(map(world.is_reserved, views))
    assert not any(map(world.is_reserved, world.views("train", 300)))
    for view in views:
        for part, index in world.caption_parts(view).items():
            assert VIEW_PARTS[part][index] in world.caption(view)
    assert len(GLYPHS) == 62


def test_pictures(world, tmp_path):
    font = world.identity("train", 0)
    view = world.view_of(("capital h", "black", "white"))
    picture = world.render(font, view)
    assert picture.shape == (24, 24, 3)
    assert picture[0, 0].tolist() == [250, 250, 250]
    rows = np.flatnonzero((picture < 100).all(axis=2).any(axis=1))
    assert 8 <= rows[-1] - rows[0] + 1 <= 16  # half the picture, give or take a serif
    columns = np.flatnonzero((picture < 100).all(axis=2).any(axis=0))
    assert abs(columns[0] + columns[-1] - 23) <= 2  # in the middle
    other = world.render(world.identity("test", 0), view)
    assert np.abs(picture.astype(int) - other).mean() > 1
    pairs = [(font, view), (world.identity("test", 0), view)]
    many = world.render_many(pairs, tmp_path, progress=False)
    np.testing.assert_array_equal(many, [picture, other])
    again = world.render_many(pairs, tmp_path, progress=False)
    np.testing.assert_array_equal(many, again)


def test_folders_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_FONTS", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"none is no folder; install fonts by tools/install_fonts"):
        by_style.open_world("fonts")
    monkeypatch.setenv("HYPERLORA_FONTS", str(tmp_path))
    (tmp_path / "broken.ttf").write_bytes(b"no font at all")
    with pytest.raises(UserError, match="found 1 font files, none with all of 62 glyphs"):
        Fonts().identity("train", 0)
    for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"):
        shutil.copy(FOLDER / name, tmp_path)
    shutil.copy(FOLDER / "DejaVuSans.ttf", tmp_path / "copy.ttf")
    usable_fonts.cache_clear()
    assert [font.family for font in usable_fonts(tmp_path)] == ["DejaVu Sans"] * 2
    with pytest.raises(UserError, match="too few font families"):
        Fonts().identity("train", 0)
    with pytest.raises(UserError, match="letters are drawn at 8 to 512 pixels"):
        Fonts(4)
    assert fonts.STYLE == "fonts"
