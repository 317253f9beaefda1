import hashlib
import itertools
import json

import numpy as np
import pytest

from hyperlora_jax.batches import pipelines, ragged
from hyperlora_jax.batches.ragged import Ragged
from hyperlora_jax.errors import UserError

ARRAYS = {"x": np.arange(10.0), "y": np.arange(20).reshape(10, 2)}


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def ids(iterator, count):
    return np.concatenate([batch["record_id"] for batch in take(iterator, count)])


def test_rows_belong_to_their_record_ids():
    for batch in take(pipelines.array_batches(ARRAYS, 4, seed=0), 5):
        np.testing.assert_array_equal(batch["x"], ARRAYS["x"][batch["record_id"]])
        np.testing.assert_array_equal(batch["y"], ARRAYS["y"][batch["record_id"]])


def test_every_epoch_has_every_record_once_in_another_order():
    order = ids(pipelines.array_batches(ARRAYS, 4, seed=0), 10).reshape(4, 10)
    for epoch in order:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in order}) == 4
    assert (ids(pipelines.array_batches(ARRAYS, 4, seed=1), 5) != order.ravel()[:20]).any()


def test_resumes_where_it_was_through_json():
    iterator = pipelines.array_batches(ARRAYS, 4, seed=0)
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = ids(iterator, 5)
    fresh = pipelines.array_batches(ARRAYS, 4, seed=0)
    fresh.set_state(state)
    np.testing.assert_array_equal(ids(fresh, 5), expected)


@pytest.mark.parametrize("rows", [[0, 1], [1, 3], [2]])
def test_a_host_gets_its_rows_of_the_global_batch(rows):
    whole = pipelines.array_batches(ARRAYS, 4, 0)
    for expected, part in zip(
        take(whole, 6), pipelines.array_batches(ARRAYS, 4, 0, np.array(rows)), strict=False
    ):
        np.testing.assert_array_equal(part["record_id"], expected["record_id"][rows])
        np.testing.assert_array_equal(part["y"], expected["y"][rows])


def test_memory_mapped_arrays(tmp_path):
    np.save(tmp_path / "x.npy", ARRAYS["y"])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    (batch,) = take(pipelines.array_batches({"y": mapped}, 3, 0), 1)
    np.testing.assert_array_equal(batch["y"], ARRAYS["y"][batch["record_id"]])
    assert not isinstance(batch["y"], np.memmap)


GRID = np.arange(8)[:, None] * 100 + np.arange(5)


def even(arrays):
    """Arrays [n, v, ...]: every subject has v rows."""
    count, views = next(iter(arrays.values())).shape[:2]
    flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}
    return Ragged(ragged.offsets_of([views] * count), flat)


def subject_iterator(**options):
    given = {
        "references": even({"reference": GRID, "embedding": GRID[..., None] + 0.5}),
        "targets": even({"target": -GRID, "caption": GRID + 7}),
        "per_subject": {"lora": np.arange(8.0)},
        "batch_size": 4,
        "seed": 0,
        "num_references": (1, 3),
        "num_targets": 2,
    }
    return pipelines.subject_batches(**{**given, **options})


def test_subjects_get_some_references_and_targets():
    given = []
    for batch in take(subject_iterator(), 50):
        record = batch["record_id"]
        assert batch["reference"].shape == batch["reference_mask"].shape == (4, 3)
        assert batch["target"].shape == (4, 2) and batch["embedding"].shape == (4, 3, 1)
        np.testing.assert_array_equal(batch["reference"] // 100, record[:, None].repeat(3, 1))
        np.testing.assert_array_equal(batch["embedding"][..., 0], batch["reference"] + 0.5)
        np.testing.assert_array_equal(batch["caption"], -batch["target"] + 7)
        np.testing.assert_array_equal(batch["lora"], record)
        assert all(len(set(row)) == 3 for row in batch["reference"].tolist())
        assert all(len(set(row)) == 2 for row in batch["target"].tolist())
        assert batch["reference_mask"][:, 0].all()
        given.append(batch["reference_mask"].sum(1))
    assert set(np.concatenate(given).tolist()) == {1, 2, 3}


def test_picks_depend_on_seed_step_and_record_only():
    whole = take(subject_iterator(), 6)
    own = np.array([0, 3])
    for expected, part in zip(whole, subject_iterator(rows=own), strict=False):
        for name, value in expected.items():
            np.testing.assert_array_equal(part[name], value[own])
    second_time = {}
    for batch in take(subject_iterator(), 12):
        for row, record in zip(batch["target"].tolist(), batch["record_id"].tolist(), strict=True):
            second_time.setdefault(record, set()).add(tuple(row))
    assert any(len(picks) > 1 for picks in second_time.values())


def test_batches_of_even_subjects_are_those_of_ever():
    """Recorded before subjects could have different numbers: a resumed run sees the same."""
    (batch,) = take(subject_iterator(seed=3), 1)
    assert batch["record_id"].tolist() == [0, 5, 4, 1]
    assert batch["reference_mask"].sum(1).tolist() == [1, 1, 3, 2]
    reference = [[4, 2, 1], [502, 501, 504], [400, 404, 401], [103, 101, 104]]
    assert batch["reference"].tolist() == reference
    assert batch["target"].tolist() == [[-3, 0], [-502, -500], [-401, -403], [-103, -100]]
    digest = hashlib.sha256()
    batches = pipelines.subject_batches(
        even({"reference": GRID}), even({"target": -GRID}), batch_size=8, seed=5,
        num_references=(2, 2), num_targets=5, per_subject={"lora": np.arange(8.0)},
    )  # fmt: skip
    for batch in take(batches, 20):
        for name in sorted(batch):
            digest.update(np.ascontiguousarray(batch[name]).tobytes())
    recorded = "570dfe9f6d3f49e399935243018edba1743a144154e644aaa7b863d20af8d68f"
    assert digest.hexdigest() == recorded, "the picks have changed: shipped runs do not repeat"


def own_rows(counts):
    """Row k of subject n is 100 n + k."""
    rows = np.concatenate([100 * n + np.arange(count) for n, count in enumerate(counts)])
    return Ragged(ragged.offsets_of(counts), {"row": rows})


def test_subjects_give_what_they_have():
    shown, given = [1, 2, 5], [2, 7, 1]
    batches = pipelines.subject_batches(
        Ragged(own_rows(given).offsets, {"reference": own_rows(given).arrays["row"]}),
        Ragged(own_rows(shown).offsets, {"target": own_rows(shown).arrays["row"]}),
        batch_size=3, seed=0, num_references=(2, 4), num_targets=3,
    )  # fmt: skip
    numbers, drawn = {0: set(), 1: set(), 2: set()}, {0: set(), 1: set(), 2: set()}
    for batch in take(batches, 40):
        assert batch["reference"].shape == (3, 4) and batch["target"].shape == (3, 3)
        for k, record in enumerate(batch["record_id"].tolist()):
            own = batch["reference"][k][batch["reference_mask"][k]].tolist()
            numbers[record].add(len(own))
            assert len(set(own)) == len(own), "a repeat does not count as another reference"
            assert (batch["reference"][k] // 100 == record).all()
            assert (batch["target"][k] // 100 == record).all()
            assert len(set(batch["target"][k].tolist())) == min(3, shown[record])
            drawn[record].update((batch["target"][k] % 100).tolist())
    assert numbers == {0: {2}, 1: {2, 3, 4}, 2: {1}}
    assert drawn == {0: {0}, 1: {0, 1}, 2: {0, 1, 2, 3, 4}}


def test_no_more_references_than_anybody_has():
    (batch,) = take(
        pipelines.subject_batches(own_rows([1, 3]), None, 2, seed=0, num_references=(1, 8)), 1
    )
    assert batch["reference_mask"].shape == (2, 3)


def test_picks_of_uneven_subjects_depend_on_seed_step_and_record_only():
    def batches(**own):
        return pipelines.subject_batches(
            own_rows([1, 4, 2, 3]), None, 4, seed=1, num_references=(1, 3), **own
        )

    whole, resumed = batches(), batches()
    take(whole, 5)
    resumed.set_state(json.loads(json.dumps(whole.get_state())))
    part = batches(rows=np.array([1, 2]))
    part.set_state(whole.get_state())
    for _ in range(4):
        expected, again, own = next(whole), next(resumed), next(part)
        for name, rows in expected.items():
            np.testing.assert_array_equal(again[name], rows)
            np.testing.assert_array_equal(own[name], rows[[1, 2]])


def test_only_the_subjects_of_a_split():
    chosen = np.array([1, 5, 6])
    assert set(ids(subject_iterator(subjects=chosen), 6).tolist()) == {1, 5, 6}


def test_targets_only():
    (batch,) = take(subject_iterator(references=None), 1)
    assert "reference_mask" not in batch and batch["target"].shape == (4, 2)


def test_wrong_use_is_named():
    with pytest.raises(UserError, match="no records to train on"):
        pipelines.array_batches({"x": np.zeros(0)}, 5, 0)
    with pytest.raises(ValueError, match="arrays of one length expected"):
        pipelines.array_batches({"x": np.zeros(3), "y": np.zeros(4)}, 2, 0)
    for wrong in ((3, 1), (0, 2), 0, (1, 2, 3)):
        with pytest.raises(UserError, match=r"train\.num_references: got \(?[0-9]"):
            subject_iterator(num_references=wrong)
    with pytest.raises(UserError, match=r"train\.images_per_subject: got 0"):
        subject_iterator(num_targets=0)
    with pytest.raises(ValueError, match="arrays of 5 rows expected"):
        Ragged(ragged.offsets_of([2, 3]), {"a": np.zeros(4)})


def test_all_subjects_are_drawn_from_a_step_on():
    batches = pipelines.subject_batches(
        None,
        None,
        batch_size=4,
        seed=0,
        per_subject={"number": np.arange(12)},
        subjects=np.asarray([1, 5]),
        subjects_until=3,
    )
    drawn = [next(batches) for _ in range(6)]
    assert {int(i) for batch in drawn[:3] for i in batch["record_id"]} == {1, 5}
    assert len({int(i) for batch in drawn[3:] for i in batch["number"]}) == 12
    assert [int(batch["step"][0]) for batch in drawn] == list(range(6))
