import itertools
import subprocess
import sys

import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds import avatar_styles
from hyperlora_jax.worlds.avatars import Avatars
from hyperlora_jax.worlds.named_views import SPLITS


@pytest.fixture(scope="module")
def avatars():
    return Avatars()


@pytest.mark.parametrize("style", avatar_styles.STYLES)
def test_every_style_renders_and_is_split_by_combination(style):
    world = Avatars(style)
    person, view = world.identity("train", 0), world.view("train", 0)
    picture = world.render(person, view)
    assert picture.shape == (world.size, world.size, 3) and picture.dtype == np.uint8
    assert picture.std() > 10
    np.testing.assert_array_equal(picture, world.render(person, view))
    assert len(world.caption(view).split()) <= 14
    assert world.licence
    reserved = {s: set() for s in SPLITS}
    for split, index in itertools.product(SPLITS, range(100)):
        person = world.identity(split, index)
        parts = dict(zip(world.identity_part_names, person.classes, strict=True))
        reserved[split].add(tuple(parts[n] for n in world.table.reserved_identity))
    for a, b in itertools.combinations(SPLITS, 2):
        assert not reserved[a] & reserved[b]


def test_every_class_of_every_part_is_seen_in_training(avatars):
    seen = {name: set() for name in avatars.identity_part_names}
    for index in range(3000):
        for name, value in avatars.identity_parts(avatars.identity("train", index)).items():
            seen[name].add(value)
    assert {n: len(v) for n, v in seen.items()} == {
        n: len(v) for n, v in avatars.identity_part_names.items()
    }


def test_identities_are_distinct_deterministic_and_cycle(avatars):
    count = avatars.num_identities("validation")
    people = [avatars.identity("validation", k) for k in range(count)]
    assert len({p.id for p in people}) == count > 2000
    assert avatars.identity("validation", count) == people[0]
    assert Avatars().identity("validation", 7) == people[7]
    assert Avatars(split_seed=1).identity("validation", 7) != people[7]
    clean_shaven = np.mean([avatars.identity("train", k).classes[-1] == "no" for k in range(300)])
    assert 0.5 < clean_shaven < 0.8


def test_views_of_the_splits_are_disjoint_by_reserved_combination(avatars):
    training, evaluation = avatars.views("train", 500), avatars.views("test", 100)
    assert not any(map(avatars.is_reserved, training))
    assert all(map(avatars.is_reserved, evaluation))
    assert avatars.views("train", 3, start=5) == training[5:8]
    assert len(set(training)) > 450


@pytest.mark.parametrize("style", avatar_styles.STYLES)
def test_captions_name_all_parts_in_words_of_letters(style):
    world = Avatars(style)
    for view in world.views("train", 100):
        words = world.caption(view).split()
        assert set(view.classes) <= set(words)
        assert all(word.isalpha() and word.islower() for word in words)
        parts = world.caption_parts(view)
        assert tuple(world.part_names[n][k] for n, k in parts.items()) == view.classes


def test_caption_determines_everything_but_the_identity(avatars):
    a, b = avatars.identity("train", 0), avatars.identity("train", 1)
    view = avatars.view("train", 0)
    assert (avatars.render(a, view) != avatars.render(b, view)).any()
    for other in avatars.views("train", 40, start=1):
        if avatars.caption(other) != avatars.caption(view):
            assert (avatars.render(a, other) != avatars.render(a, view)).any()


def test_larger_pixel_art_only_repeats_its_own_grid(avatars):
    assert avatars.size == 16
    larger = Avatars(size=32)
    for k in range(20):
        shown = avatars.identity("test", k), avatars.view("test", k)
        own, picture = avatars.render(*shown), larger.render(*shown)
        np.testing.assert_array_equal(picture, own.repeat(2, 0).repeat(2, 1))


def test_names_become_single_words():
    assert avatar_styles.word("happy03") == "happythree"
    assert avatar_styles.word("variant23") == "twentythree"
    assert avatar_styles.word("angryWithFang") == "angrywithfang"
    assert avatar_styles.word("variant0205") == "twohundredfive"


def test_render_many_equals_render_with_workers_and_cache(avatars, tmp_path):
    pairs = [(avatars.identity("train", k), avatars.view("train", k)) for k in range(150)]
    one = avatars.render_many(pairs, num_workers=0, progress=False)
    np.testing.assert_array_equal(one[3], avatars.render(*pairs[3]))
    cached = avatars.render_many(pairs, cache_dir=tmp_path, num_workers=2, progress=False)
    np.testing.assert_array_equal(one, cached)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    again = avatars.render_many(pairs, cache_dir=tmp_path, progress=False)
    np.testing.assert_array_equal(one, again)
    assert path.stat().st_mtime_ns == before
    np.save(path, np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(UserError, match=r"found pictures .* expected \(150, 16, 16, 3\)"):
        avatars.render_many(pairs, cache_dir=tmp_path, progress=False)


def test_wrong_use_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="unknown style 'anime', expected one of pixel-art"):
        Avatars("anime")
    with pytest.raises(UserError, match="size is 4, expected 8 to 1024"):
        Avatars(size=4)
    (tmp_path / "file").write_text("x")
    world = Avatars()
    pair = (world.identity("train", 0), world.view("train", 0))
    with pytest.raises(UserError, match="cannot write the avatar cache"):
        world.render_many([pair], cache_dir=tmp_path / "file", progress=False)
    with pytest.raises(ValueError, match="split is 'dev', expected one of"):
        world.identity("dev", 0)
    with pytest.raises(ValueError, match="is of style pixel-art, these are micah"):
        Avatars("micah").render(*pair)


def test_missing_extra_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "dicebear", None)
    with pytest.raises(UserError, match=r'pip install "hyperlora-jax\[avatars\]"'):
        avatar_styles.definition("pixel-art")


def test_importing_the_module_does_not_need_the_extra():
    code = "import sys; import hyperlora_jax.worlds.avatars; assert 'dicebear' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
