import dataclasses
import shutil

import numpy as np
import pytest
from array_record.python import array_record_module
from targets_fixture import SPEC, subject

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors
from hyperlora_jax.targets import gauged_targets, lora_targets_writer
from hyperlora_jax.targets.gauged_targets import read_in_gauge
from hyperlora_jax.targets.lora_targets import open_lora_targets
from hyperlora_jax.targets.lora_targets_writer import write_lora_targets
from hyperlora_jax.targets.mapped_vectors import MappedVectors
from hyperlora_jax.targets.vector_statistics import RunningWhitening


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    splits = ["train"] * 40 + ["test"] * 5
    given = [subject(k, split=split) for k, split in enumerate(splits)]
    path = tmp_path_factory.mktemp("data") / "targets"
    return open_lora_targets(write_lora_targets(path, given, SPEC, ""))


def fresh(path, count=20, spec=SPEC, **settings):
    """A dataset of its own, for tests that look at what is kept in it."""
    given = [subject(k, split="train" if k < count - 3 else "test") for k in range(count)]
    if spec is not SPEC:
        sized = [np.random.default_rng(k).normal(size=spec.num_parameters) for k in range(count)]
        given = [
            dataclasses.replace(one, lora=vector.astype(np.float32))
            for one, vector in zip(given, sized, strict=True)
        ]
    return open_lora_targets(write_lora_targets(path, given, spec, "", **settings))


@pytest.mark.parametrize("kind", ["raw", "svd", "procrustes"])
def test_deltas_stay_and_statistics_are_those_of_the_gauge(targets, kind):
    gauged = read_in_gauge(targets, kind)
    vectors = np.asarray(gauged.vectors)
    raw, turned = (vectorize.unflatten(v, SPEC) for v in (targets.matrix(), vectors))
    for site in SPEC.sites:
        a, b = (factors.delta(site_factors(tree, site)) for tree in (raw, turned))
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())
    np.testing.assert_allclose(gauged.whitening.mean, vectors[:40].mean(0), atol=1e-5)
    assert (kind == "raw") == np.array_equal(vectors, targets.matrix())


def test_statistics_are_those_of_chunks_of_16_to_the_last_bit(targets):
    # What a run was begun with must not change: other chunks give other last digits.
    running = RunningWhitening(SPEC)
    for start in range(0, 40, 16):
        running.add(targets.matrix("train")[start : start + 16])
    found, expected = read_in_gauge(targets, "raw").whitening, running.result()
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.std, expected.std)


@pytest.mark.parametrize("kind", ["raw", "svd", "procrustes"])
def test_a_second_run_reads_no_record_and_finds_the_same(kind, tmp_path, monkeypatch):
    targets = fresh(tmp_path / "targets")
    first = read_in_gauge(targets, kind, tmp_path / "run")
    files = sorted(path.name.split("-")[0] for path in (targets.path / "cache").iterdir())
    assert files == (["summary"] if kind == "raw" else ["summary", "vectors"])
    assert not (tmp_path / "run").exists()

    def nothing(*_):
        raise AssertionError("a record is read")

    again = open_lora_targets(targets.path)
    monkeypatch.setattr(again, "read", nothing)
    second = read_in_gauge(again, kind, tmp_path / "run")
    np.testing.assert_array_equal(second.vectors[[3, 19, 0]], np.asarray(first.vectors)[[3, 19, 0]])
    np.testing.assert_array_equal(second.whitening.mean, first.whitening.mean)
    np.testing.assert_array_equal(second.whitening.std, first.whitening.std)
    assert second.facts() == first.facts()
    assert (first.reference is None) == (second.reference is None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_longer_than_blocks_of_the_file_are_rows_of_it(dtype, tmp_path, monkeypatch):
    # 40,010 numbers run over three blocks of 64 KiB, and begin at another place in each record.
    monkeypatch.setattr(lora_targets_writer, "SHARD_BYTES", 2**20)
    spec = LoraSpec((LoraSite("mid_block.attentions.0.to_q", 20_000, 5, 2),))
    targets = fresh(tmp_path / "targets", 13, spec, lora_dtype=dtype)
    gauged = read_in_gauge(targets)
    assert isinstance(gauged.vectors, MappedVectors) and gauged.vectors.shape == (13, 40_010)
    np.testing.assert_array_equal(gauged.vectors, targets.matrix())
    chosen = np.array([12, 0, 7, 7])
    np.testing.assert_array_equal(gauged.vectors[chosen], targets.loras(chosen))
    np.testing.assert_array_equal(gauged.vectors[-1], targets.loras([12])[0])
    assert gauged.vectors[chosen[:0]].shape == (0, 40_010)


def test_records_that_cannot_be_mapped_are_copied_once(tmp_path):
    targets = fresh(tmp_path / "targets")
    for file in targets.path.glob("*.array_record-*"):  # as TFDS' own writer groups and packs them
        reader = array_record_module.ArrayRecordReader(str(file))
        records = reader.read_all()
        reader.close()
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:4")
        for record in records:
            writer.write(record)
        writer.close()
    targets = open_lora_targets(targets.path)
    for _ in range(2):
        gauged = read_in_gauge(targets)
        assert isinstance(gauged.vectors, np.memmap)
        np.testing.assert_array_equal(gauged.vectors, targets.matrix())
    assert len(list((targets.path / "cache").glob("vectors-raw-*.npy"))) == 1


def test_a_dataset_that_cannot_be_written_is_kept_by_the_run(tmp_path):
    targets = fresh(tmp_path / "targets")
    (targets.path / "cache").write_text("in the way, as a read-only disk is")
    for kind in ("raw", "svd"):
        first = read_in_gauge(targets, kind, tmp_path / "run")
        assert len(list((tmp_path / "run").glob(f"*-{kind}-*"))) == (1 if kind == "raw" else 2)
        np.testing.assert_array_equal(
            read_in_gauge(targets, kind, tmp_path / "run").vectors, first.vectors
        )


def test_what_is_kept_of_another_state_of_the_dataset_is_not_used(tmp_path):
    old = read_in_gauge(fresh(tmp_path / "targets"))
    kept = next((tmp_path / "targets" / "cache").iterdir())
    content = kept.read_bytes()
    new = fresh(tmp_path / "targets", 17, overwrite=True)
    (new.path / "cache").mkdir()
    (new.path / "cache" / kept.name).write_bytes(content)
    found = read_in_gauge(new)
    np.testing.assert_array_equal(found.vectors, new.matrix())
    assert not np.array_equal(found.whitening.mean, old.whitening.mean)


@pytest.mark.parametrize("spoilt", [b"", b"PK no archive", "half"])
def test_a_kept_file_that_is_damaged_is_made_again(spoilt, tmp_path, caplog):
    targets = fresh(tmp_path / "targets")
    first = read_in_gauge(targets, "procrustes")
    expected = np.array(first.vectors)
    for path in (targets.path / "cache").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if spoilt == "half" else spoilt)
    second = read_in_gauge(targets, "procrustes")
    np.testing.assert_array_equal(second.vectors, expected)
    np.testing.assert_array_equal(second.whitening.std, first.whitening.std)
    assert caplog.text.count("cannot be read and is made again") == 2


def test_numbers_that_are_not_finite_are_known_by_row(tmp_path):
    given = [subject(k, split="train") for k in range(20)]
    for k in (3, 17):
        given[k].lora[5] = np.nan
    targets = open_lora_targets(write_lora_targets(tmp_path / "targets", given, SPEC, ""))
    for _ in range(2):
        np.testing.assert_array_equal(read_in_gauge(targets).not_finite, [3, 17])


def test_svd_signs_agree_with_the_training_mean(targets):
    gauged = read_in_gauge(targets, "svd")
    reference = vectorize.unflatten(gauged.reference, SPEC)
    lora = vectorize.unflatten(gauged.vectors, SPEC)
    site = SPEC.sites[0]
    ours, mean = site_factors(lora, site), site_factors(reference, site)
    inner = np.einsum("lir,ir->lr", ours["down"], mean["down"])
    inner += np.einsum("lro,ro->lr", ours["up"], mean["up"])
    assert (inner >= -1e-5).all()


def test_facts_are_those_of_the_dataset_and_not_of_this_machine_s_rounding(
    targets, tmp_path, monkeypatch
):
    facts = {kind: read_in_gauge(targets, kind).facts() for kind in ("raw", "svd", "procrustes")}
    exact = gauged_targets.gauge_reference
    monkeypatch.setattr(
        gauged_targets,
        "gauge_reference",
        lambda *a: None if exact(*a) is None else exact(*a) + 1e-7,
    )
    for kind, expected in facts.items():
        assert read_in_gauge(targets, kind).facts() == expected
    other = write_lora_targets(tmp_path / "o", [subject(k) for k in range(3)], SPEC, "b" * 64)
    assert read_in_gauge(open_lora_targets(other), "svd").facts() != facts["svd"]


def test_wrong_gauge_and_cache_are_named(tmp_path, monkeypatch):
    targets = fresh(tmp_path / "targets")
    with pytest.raises(UserError, match="gauge is 'qr', expected one of raw, svd, procrustes"):
        read_in_gauge(targets, "qr")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match=r"cache and .*run: cannot write turned .*, 0 free"):
        read_in_gauge(targets, "svd", tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
