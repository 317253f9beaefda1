"""tools/drawing.py: who is recognised in which half, what is kept, which strength is best."""

import json
import types

import drawing
import numpy as np
import pytest

COUNT, CAPTIONS = 5, 3


@pytest.fixture
def people(tmp_path):
    """Five people whose exact pictures are noise; nothing is drawn by a model."""
    random = np.random.default_rng(0)
    found = object.__new__(drawing.People)
    found.count, found.workdir, found.key = COUNT, tmp_path, ["a base"]
    found.partner = np.roll(np.arange(COUNT), 1)
    pool = random.integers(0, 256, (COUNT + 2, 4, 6, 6, 3), np.uint8)
    index = np.stack([random.permutation(4)[:CAPTIONS] for _ in range(COUNT)])
    others = np.stack([random.permutation(COUNT + 2) for _ in range(COUNT)])
    found.asked = types.SimpleNamespace(pool=pool, caption_index=index, candidates=others)
    return found


def pair(people, left, right):
    """Exact pictures of both, side by side, under the captions of who is asked for."""

    def picture(shown, asked):
        return people.asked.pool[shown][people.asked.caption_index[asked]] / np.float32(255)

    everybody = range(people.count)
    halves = [
        np.stack([picture(who[i], beside[i]) for i in everybody])
        for who, beside in ((left, np.arange(people.count)), (right, people.partner))
    ]
    return np.concatenate(halves, 3)


def test_each_half_is_judged_by_itself(people, monkeypatch):
    own, partner = np.arange(people.count), people.partner
    shown = {}
    monkeypatch.setattr(people, "draw_pairs", lambda way, strength: shown[way], raising=False)
    stranger = np.full(people.count, people.count)
    shown["right places"] = pair(people, own, partner)
    shown["swapped"] = pair(people, partner, own)
    shown["only left"] = pair(people, own, stranger)
    shown[drawing.ALONE] = shown["right places"][..., :6, :]
    for way, left, right, other in (
        ("right places", 1, 1, 0),
        ("swapped", 0, 0, 1),
        ("only left", 1, 0, 0),
        (drawing.ALONE, 1, None, 0),
    ):
        seen = people.recognised(way, 1.0)
        assert (seen["left"] == left).all() and (seen["other"] == other).all(), way
        assert "right" not in seen if right is None else (seen["right"] == right).all(), way


def test_pictures_are_drawn_once_and_the_last_batch_is_cut(people, monkeypatch):
    monkeypatch.setattr(drawing, "BATCH", 2)
    asked = []

    def draw(who):
        asked.append(who.tolist())
        return np.repeat(who, CAPTIONS).reshape(-1, 1, 1, 1)

    first, again = people.kept("a way", draw), people.kept("a way", draw)
    assert asked == [[0, 1], [2, 3], [4, 4]]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:, :, 0, 0, 0], np.arange(COUNT)[:, None].repeat(3, 1))
    people.kept("another way", draw)
    assert len(asked) == 6


def test_the_lowest_of_the_best_strengths_is_taken():
    assert drawing.best({0.5: 0.1, 1.0: 0.7, 1.5: 0.7, 2.0: 0.6}) == 1.0


def test_a_record_says_what_it_is_of(monkeypatch, tmp_path):
    monkeypatch.setitem(drawing.MEASURES, "branches", lambda given: {"title": "Guidance"})
    file = tmp_path / "record.json"
    flags = ["--workdir", str(tmp_path), "--base", "mine", "--variant", "mine", "--json", str(file)]
    assert drawing.main(["branches", *flags]) == 0
    record = json.loads(file.read_text())
    assert record["title"] == "Guidance, mine"
    assert record["command"] == "python tools/drawing.py branches --workdir WORKDIR --base BASE"
