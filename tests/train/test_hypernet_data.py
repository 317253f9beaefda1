"""Target LoRAs of one dataset or of several, by subject."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from hyperlora_jax.batches.pipelines import subject_batches
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.subjects.encoded_subjects import EncodedSubjects
from hyperlora_jax.targets import lora_targets_writer
from hyperlora_jax.targets.lora_targets_writer import write_lora_targets
from hyperlora_jax.train.hypernetwork.hypernet_data import read_targets, same_as_before

SPEC = LoraSpec((LoraSite("mid_block.attentions.0.to_q", 6, 4, 2),))
NAMES = [f"p{k}" for k in range(12)]


def vector(k):
    return np.random.default_rng(k).normal(k, 1, SPEC.num_parameters).astype(np.float32)


def write(path, numbers):
    subjects = [Subject(NAMES[k], NAMES[k], lora=vector(k), split="train") for k in numbers]
    return write_lora_targets(path, subjects, SPEC, "base", {"recipe": {"from": path.name}})


def read(tmp_path, targets, **settings):
    encoded = EncodedSubjects(ids=tuple(NAMES))
    data = {
        "targets": targets,
        "target_weights": (),
        "gauge": "raw",
        "num_targets": 0,
        "skip_damaged": False,
    }
    config = ConfigDict({"data": {**data, **settings}})
    return read_targets(config, tmp_path / "targets", tmp_path, SPEC, "base", encoded)


def test_one_dataset(tmp_path):
    write(tmp_path / "targets", [1, 4, 7])
    found = read(tmp_path, "")
    np.testing.assert_array_equal(found.subjects, [1, 4, 7])
    np.testing.assert_array_equal(found.rows[np.array([4, 0])], [vector(4), 0 * vector(0)])
    np.testing.assert_array_equal(found.rows.of(found.subjects), [vector(k) for k in (1, 4, 7)])
    assert found.facts["dataset"] == {"from": "targets"} and found.order(0) is None
    assert len(read(tmp_path, "", num_targets=2).subjects) == 2
    with pytest.raises(UserError, match=r"got 4, but .*targets has 3 LoRAs"):
        read(tmp_path, "", num_targets=4)


def test_damaged_files_are_left_out_when_the_config_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_targets_writer, "SHARD_BYTES", 1000)
    path = write(tmp_path / "targets", range(12))
    shards = sorted(path.glob("*.array_record-*"))
    assert len(shards) > 2
    shards[0].write_bytes(shards[0].read_bytes()[:50])
    with pytest.raises(UserError, match=f"{shards[0].name} is damaged"):
        read(tmp_path, "")
    found = read(tmp_path, "", skip_damaged=True)
    assert 0 < len(found.subjects) < 12 and found.facts["targets"] == len(found.subjects)
    for k in found.subjects:
        np.testing.assert_array_equal(found.rows[np.array([k])], [vector(k)])


def test_several_datasets_are_drawn_in_their_shares(tmp_path):
    few, many = write(tmp_path / "few", [0, 5]), write(tmp_path / "many", [1, 2, 3, 6, 7, 8])
    found = read(tmp_path, f"{few},{many}", target_weights=(3, 1))
    np.testing.assert_array_equal(found.subjects, [0, 1, 2, 3, 5, 6, 7, 8])
    chosen = np.array([5, 2, 9, 0])
    expected = np.stack([vector(5), vector(2), 0 * vector(9), vector(0)])
    np.testing.assert_array_equal(found.rows[chosen], expected)
    batches = subject_batches(
        None, None, 64, seed=0, per_subject={"target": found.rows}, subjects=found.subjects,
        order=found.order(0),
    )  # fmt: skip
    drawn = np.concatenate([next(batches)["record_id"] for _ in range(16)])
    assert abs(np.isin(drawn, [0, 5]).mean() - 0.75) < 0.01
    assert set(drawn) == set(found.subjects)
    assert [part["dataset"]["from"] for part in found.facts["datasets"]] == ["few", "many"]


def test_statistics_of_a_mixture_are_those_of_its_draws(tmp_path):
    few, many = write(tmp_path / "few", [0, 5]), write(tmp_path / "many", [1, 2, 3, 6, 7, 8])
    together = write(tmp_path / "both", [0, 5, 1, 2, 3, 6, 7, 8])
    found, whole = read(tmp_path, f"{few},{many}"), read(tmp_path, str(together))
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-5)
    np.testing.assert_allclose(found.std, whole.std, rtol=1e-5)


@pytest.mark.parametrize(
    ("targets", "settings", "match"),
    [
        ("few,many", {"target_weights": (1,)}, r"got \(1\.0,\) for 2 datasets"),
        ("few,many", {"gauge": "svd"}, "got 'svd' for 2 datasets, expected 'raw'"),
        ("few,few2", {}, "few2: subject p5 is in another dataset"),
        ("few,gone", {}, "gone: is no LoRA-target dataset"),
    ],
)
def test_wrong_mixtures_are_named(tmp_path, targets, settings, match):
    write(tmp_path / "few", [0, 5])
    write(tmp_path / "few2", [5])
    write(tmp_path / "many", [1, 2])
    paths = ",".join(str(tmp_path / name) for name in targets.split(","))
    with pytest.raises(UserError, match=match):
        read(tmp_path, paths, **settings)


def test_a_run_says_which_subjects_have_other_pictures(tmp_path):
    def go_on(**subjects):
        marks = [f"{name} {count}" for name, count in subjects.items()]
        same_as_before(tmp_path, list(subjects), marks, list(subjects.values()))

    go_on(anna=1)
    go_on(anna=2, bert=2)  # nothing is trained yet
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    go_on(anna=2, bert=2)
    with pytest.raises(UserError, match=r"1 of its 2 subjects .* 'anna' \(2 pictures, now 3\)"):
        go_on(anna=3, bert=2)
    with pytest.raises(UserError, match=r"than the 2 that it was .* on: 1 new \(first 'carl'"):
        go_on(anna=2, bert=2, carl=1)
    with pytest.raises(UserError, match=r"on: 1 gone \(first 'bert'\); use another workdir"):
        go_on(anna=2)
