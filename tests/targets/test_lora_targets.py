import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from targets_fixture import SPEC, assert_same, subject

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.pictures.subjects import Subject, split_by_hash
from hyperlora_jax.targets import lora_target_records, lora_targets_writer, spool
from hyperlora_jax.targets.lora_targets import LoraTargets, open_lora_targets
from hyperlora_jax.targets.lora_targets_writer import write_lora_targets
from hyperlora_jax.targets.vector_statistics import factor_slices

BASE = "b" * 64


@pytest.fixture(scope="module")
def subjects():
    splits = ["train"] * 40 + ["validation"] * 3 + ["test"] * 2
    return [subject(k, split=split) for k, split in enumerate(splits)]


@pytest.fixture(scope="module")
def dataset(subjects, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "targets"
    return write_lora_targets(path, subjects, SPEC, BASE, {"recipe": "made up", "init_seed": 3})


def test_everything_comes_back(dataset, subjects):
    targets = open_lora_targets(dataset, SPEC, BASE)
    assert len(targets) == 45
    for k in (0, 39, 40, 44, -1):
        assert_same(targets[k], subjects[k])
        assert targets[k].split == subjects[k].split
    assert targets.ids == [one.id for one in subjects]
    assert targets.identities == [one.identity for one in subjects]
    assert targets.split_ids["validation"] == targets.ids[40:43]
    assert targets.split_indices("test").tolist() == [43, 44]
    assert targets.base_hash == BASE and targets.facts["init_seed"] == 3
    with pytest.raises(IndexError):
        targets[45]


def test_vectors_and_their_statistics(dataset, subjects):
    targets = open_lora_targets(dataset)
    matrix = targets.matrix("train")
    np.testing.assert_array_equal(matrix, np.stack([one.lora for one in subjects[:40]]))
    assert targets.matrix().shape == (45, SPEC.num_parameters)
    mean = matrix.mean(axis=0)
    stats = targets.whitening()
    np.testing.assert_allclose(stats.mean, mean, atol=1e-6)
    for piece, std in zip(factor_slices(SPEC), stats.std, strict=True):
        centred = (matrix - mean)[:, piece.start : piece.stop]
        np.testing.assert_allclose(std, centred.std(), rtol=1e-5)
    (dataset / "whitening.safetensors").rename(dataset / "moved")
    again = targets.whitening()
    (dataset / "moved").rename(dataset / "whitening.safetensors")
    np.testing.assert_allclose(again.mean, stats.mean, atol=1e-7)


READER = """
    import sys, json
    for name in ("hyperlora_jax", "jax", "PIL", "cv2", "ml_dtypes", "torch"):
        sys.modules[name] = None  # importing it is an ImportError
    import tensorflow_datasets as tfds
    builder = tfds.builder_from_directory(sys.argv[1])
    source = builder.as_data_source(split="train")
    one = source[7]
    assert len(source) == 40
    assert "spec" in builder.info.metadata
    assert "tensorflow" not in sys.modules
    print(json.dumps({"id": one["id"].decode(), "lora": one["lora"].tolist(),
        "png": list(one["references"][0]), "tiny": one["embeddings"]["tiny"].tolist(),
        "caption": one["targets"]["caption"][0].decode(), "losses": len(one["loss_curve"]),
        "seed": int(one["seed"])}))
"""


def check_reader(python, dataset, given):
    command = [str(python), "-c", textwrap.dedent(READER), str(dataset)]
    read = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    np.testing.assert_array_equal(np.float32(read["lora"]), given.lora)
    assert bytes(read["png"]) == given.references[0]
    np.testing.assert_array_equal(np.float32(read["tiny"]), given.embeddings["tiny"])
    assert (read["id"], read["caption"]) == (given.id, given.captions[0])
    assert (read["losses"], read["seed"]) == (4, 7)


def test_tfds_alone_opens_it(dataset, subjects):
    """Without our code and without all that the package needs but TFDS does not."""
    check_reader(sys.executable, dataset, subjects[7])


@pytest.mark.slow
def test_an_environment_of_tfds_and_array_record_opens_it(dataset, subjects):
    """Nothing else is installed: .venv-bare beside the repository's own, built once."""
    folder = Path(__file__).parents[2] / ".venv-bare"
    python, marker = folder / "bin" / "python", folder / "packages.txt"
    packages = ["tensorflow-datasets==4.9.10", "array_record==0.8.6"]
    if not marker.exists() or marker.read_text() != "\n".join(packages):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        marker.write_text("\n".join(packages))
    listed = subprocess.run([str(python), "-m", "pip", "list"], capture_output=True, check=True)
    assert b"tensorflow " not in listed.stdout and b"jax" not in listed.stdout
    check_reader(python, dataset, subjects[7])


def test_records_equal_those_of_tfds_own_serializer(subjects):
    one = subjects[0]
    features = lora_target_records.features(SPEC.num_parameters, "float32", {"tiny": 3})
    example = {
        "id": one.id,
        "identity": one.identity,
        "references": list(one.references),
        "targets": [{"image": one.targets[0], "caption": one.captions[0]}],
        "seed": one.seed,
        "num_steps": one.num_steps,
        "loss_curve": one.loss_curve,
        "lora": one.lora,
        "embeddings": one.embeddings,
    }
    record = features.serialize_example(example)
    assert_same(lora_target_records.parse(record, "float32", {"tiny": 3}), one)


def test_vectors_are_found_without_decoding(subjects):
    for one in (*subjects[:5], subject(7, references=(), embeddings={}, targets=(), captions=())):
        for dtype in ("float32", "bfloat16"):
            record = lora_target_records.serialize(one, dtype)
            whole = lora_target_records.parse(record, dtype, {}).lora
            np.testing.assert_array_equal(lora_target_records.parse_vector(record, dtype), whole)
    with pytest.raises(KeyError):
        record = lora_target_records.serialize(subject(0, lora=False), "float32")
        lora_target_records.parse_vector(record, "float32")
    for cut in range(1, 400, 13):
        with pytest.raises((ValueError, IndexError, KeyError)):
            lora_target_records.parse_vector(record[:cut], "float32")


def test_bfloat16_halves_the_numbers_and_rounds_to_nearest(subjects, tmp_path):
    import ml_dtypes

    path = write_lora_targets(tmp_path / "t", subjects[:3], SPEC, BASE, lora_dtype="bfloat16")
    expected = subjects[1].lora.astype(ml_dtypes.bfloat16).astype(np.float32)
    targets = open_lora_targets(path)
    np.testing.assert_array_equal(targets[1].lora, expected)
    halves = targets.loras([1], dtype="bfloat16")
    assert halves.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(halves[0].astype(np.float32), expected)
    whole = open_lora_targets(write_lora_targets(tmp_path / "w", subjects[:3], SPEC, BASE))
    np.testing.assert_array_equal(whole.loras([1], dtype="bfloat16"), halves)
    with pytest.raises(UserError, match="dtype of LoRAs is 'int8'"):
        targets.loras([0], dtype="int8")
    assert "bfloat16 bits" in (path / "README.md").read_text()


def test_spool_becomes_a_dataset_with_a_card(subjects, tmp_path):
    for one in subjects[:4]:
        spool.write_finished(tmp_path / "spool", one)
    files = spool.finished_files(tmp_path / "spool").values()
    finished = [spool.read_finished(file) for file in files]
    path = write_lora_targets(tmp_path / "targets", finished, SPEC, BASE)
    assert set(open_lora_targets(path).ids) == {one.id for one in subjects[:4]}
    card = (path / "README.md").read_text()
    assert SPEC.fingerprint in card and BASE in card and f"{SPEC.num_parameters:,}" in card


def test_subjects_without_loras(tmp_path):
    given = [subject(k, lora=False) for k in range(3)]
    path = write_lora_targets(tmp_path / "pictures", given, LoraSpec(()), "")
    targets = open_lora_targets(path)
    assert targets[0].lora is None and targets[2].targets
    with pytest.raises(UserError, match="holds pictures only"):
        targets.matrix()
    assert "Pictures only" in (path / "README.md").read_text()


def test_splits_are_by_identity(tmp_path):
    given = [subject(k, identity=f"person {k // 4}") for k in range(120)]
    targets = open_lora_targets(write_lora_targets(tmp_path / "t", given, SPEC, BASE))
    owners = {}
    for k, identity in enumerate(targets.identities):
        owners.setdefault(identity, set()).add(targets[k].split)
    assert all(len(splits) == 1 for splits in owners.values())
    assert {min(s) for s in owners.values()} >= {"train"}
    shares = [split_by_hash(f"p{k}", 1, 0.1, 0.2) for k in range(2000)]
    assert abs(shares.count("validation") / 2000 - 0.1) < 0.03
    assert abs(shares.count("test") / 2000 - 0.2) < 0.03
    with pytest.raises(UserError, match="'person 0' is in split test and in train"):
        both = [subject(0, split="train"), subject(1, identity="person 0", split="test")]
        write_lora_targets(tmp_path / "u", both, SPEC, BASE)


def test_many_shards(subjects, tmp_path, monkeypatch):
    monkeypatch.setattr("hyperlora_jax.targets.lora_targets_writer.SHARD_BYTES", 5000)
    targets = open_lora_targets(write_lora_targets(tmp_path / "t", subjects, SPEC, BASE))
    assert len(list((tmp_path / "t").glob("*train*.array_record-*"))) > 5
    for k in range(45):
        assert targets[k].id == subjects[k].id


def test_a_killed_build_is_not_seen_and_does_not_disturb_the_next(subjects, tmp_path):
    code = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from targets_fixture import SPEC, subject
        from hyperlora_jax.targets.lora_targets_writer import write_lora_targets

        def killed():
            yield from map(subject, range(3))
            os.kill(os.getpid(), signal.SIGKILL)

        write_lora_targets(sys.argv[2], killed(), SPEC, "")
    """
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", textwrap.dedent(code), here, str(tmp_path / "t")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "t").exists() and list(tmp_path.iterdir())
    targets = open_lora_targets(write_lora_targets(tmp_path / "t", subjects, SPEC, BASE))
    assert len(targets) == 45 and [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_failed_build_leaves_nothing(subjects, tmp_path):
    def broken():
        yield subjects[0]
        raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError):
        write_lora_targets(tmp_path / "t", broken(), SPEC, BASE)
    assert list(tmp_path.iterdir()) == []


def test_wrong_subjects_are_named(subjects, tmp_path):
    def refuse(given, match, spec=SPEC, **options):
        with pytest.raises(UserError, match=match):
            write_lora_targets(tmp_path / "t", given, spec, BASE, **options)

    refuse([], "no subjects to write")
    refuse([subjects[0], subjects[0]], "'subject 0/a' is given twice")
    refuse(subjects[:1], "has 84 numbers, the spec .* has 168", SPEC.with_rank(4))
    refuse([subject(0, lora=False)], "its LoRA has 0 numbers")
    refuse(subjects[:1], "lora_dtype is 'float8'", lora_dtype="float8")
    other = {"wide": np.zeros((2, 9), np.float32)}
    refuse([subjects[0], subject(1, embeddings=other)], "its embeddings are {'wide': 9}")
    with pytest.raises(ValueError, match="2 targets and 1 captions"):
        Subject("a", "a", targets=(b"", b""), captions=("",))
    with pytest.raises(ValueError, match="split 'dev'"):
        Subject("a", "a", split="dev")
    with pytest.raises(ValueError, match="3 x embeddings for 0 references"):
        Subject("a", "a", embeddings={"x": np.zeros((3, 2), np.float32)})


def test_existing_folder_is_kept_unless_told(subjects, tmp_path):
    path = write_lora_targets(tmp_path / "t", subjects[:2], SPEC, BASE)
    with pytest.raises(UserError, match="exists and is not empty"):
        write_lora_targets(path, subjects, SPEC, BASE)
    write_lora_targets(path, subjects[:3], SPEC, BASE, overwrite=True)
    assert len(open_lora_targets(path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: is a file, expected a new dataset folder"):
        write_lora_targets(tmp_path / "file", subjects, SPEC, BASE)
    with pytest.raises(UserError, match="cannot write the dataset"):
        write_lora_targets(tmp_path / "file" / "t", subjects, SPEC, BASE)


def test_wrong_datasets_are_named(dataset, tmp_path):
    with pytest.raises(UserError, match="is no LoRA-target dataset"):
        open_lora_targets(tmp_path)
    with pytest.raises(UserError, match=r"rank 2, 84 numbers\), expected .* rank 4, 168 numbers"):
        open_lora_targets(dataset, SPEC.with_rank(4))
    with pytest.raises(UserError, match="fitted on base bbbbbbbbbbbb, expected base cccccccccccc"):
        open_lora_targets(dataset, base_hash="c" * 64)
    (tmp_path / "metadata.json").write_text('{"format": "hyperlora-lora-targets/9"}')
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="is of format 'hyperlora-lora-targets/9'"):
        open_lora_targets(tmp_path)


def test_lost_and_cut_shards_are_named(subjects, tmp_path):
    path = write_lora_targets(tmp_path / "t", subjects, SPEC, BASE)
    (shard,) = path.glob("*test*.array_record-*")
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match="1 of 3 files are missing, first lora_targets-test"):
        open_lora_targets(path)[0]
    info = path / "dataset_info.json"
    for content in ("{", "{}"):
        saved = info.read_text()
        shard.write_bytes(whole)
        info.write_text(content)
        with pytest.raises(UserError, match="the dataset cannot be read"):
            open_lora_targets(path)[0]
        info.write_text(saved)
    for cut in (0, 100, len(whole) // 2):
        shard.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cannot be read, lora_targets-test\S+ is damaged"):
            open_lora_targets(path)[-1]


@pytest.mark.parametrize("damage", ["missing", "cut", "overwritten"])
def test_damaged_shards_are_left_out_only_when_asked(
    damage, subjects, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(lora_targets_writer, "SHARD_BYTES", 20_000)
    path = write_lora_targets(tmp_path / "t", subjects, SPEC, BASE)
    shards = sorted(path.glob("*train*.array_record-*"))
    assert len(shards) >= 3
    content = shards[1].read_bytes()
    if damage == "missing":
        shards[1].unlink()
    else:
        cut = content[: len(content) // 2]
        shards[1].write_bytes(cut if damage == "cut" else cut + b"\0" * (len(content) - len(cut)))
    with pytest.raises(UserError, match=shards[1].name):
        open_lora_targets(path).matrix()
    targets = open_lora_targets(path, skip_damaged=True)
    assert shards[1].name in caplog.text and shards[0].name not in caplog.text
    names = [one.id for one in subjects]
    assert 0 < len(targets) < len(subjects)
    for k in range(len(targets)):
        assert_same(targets[k], subjects[names.index(targets.ids[k])])
    assert targets.split_ids["test"] == names[-2:] and targets.identities[-1] == "person 44"
    assert len(targets.matrix("train")) == len(targets.split_indices("train")) < 40
    caplog.clear()
    with monkeypatch.context() as patch:  # a second run knows without reading
        patch.delattr(LoraTargets, "__getitem__")
        again = open_lora_targets(path, skip_damaged=True)
    assert again.ids == targets.ids and shards[1].name in caplog.text
    for shard in path.glob("*.array_record-*"):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match=f"none of its {len(subjects)} subjects can be read"):
        open_lora_targets(path, skip_damaged=True)
