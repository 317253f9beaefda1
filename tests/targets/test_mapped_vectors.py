"""LoRA vectors as rows of ArrayRecord files: against array_record's own reader."""

import itertools

import numpy as np
import pytest
from array_record.python import array_record_module

from hyperlora_jax.targets.mapped_vectors import ROOM, MappedFile, MappedVectors, record_starts

SIZES = (1, 100, ROOM - 41, ROOM, 3 * ROOM + 7, 200_000, 5)


def write(path, records, options="group_size:1,uncompressed"):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_every_record_is_found_whole_wherever_blocks_end(tmp_path):
    records = [np.random.default_rng(k).bytes(size) for k, size in enumerate(SIZES * 3)]
    file = MappedFile(write(tmp_path / "records", records))
    starts = list(itertools.islice(file.records(), len(records)))
    read = array_record_module.ArrayRecordReader(str(tmp_path / "records")).read_all()
    for start, record, expected in zip(starts, read, records, strict=True):
        found = np.empty(len(record), np.uint8)
        file.copy(start, found)
        assert found.tobytes() == record == expected


@pytest.mark.parametrize("options", ["group_size:3,uncompressed", "group_size:1"])
def test_records_that_do_not_lie_there_as_they_are_are_refused(options, tmp_path):
    file = MappedFile(write(tmp_path / "records", [bytes(1000)] * 6, options))
    with pytest.raises(ValueError, match="expected 1 uncompressed"):
        record_starts([file], np.zeros(6, int), np.arange(6))


def test_files_that_end_early_are_refused(tmp_path):
    path = write(tmp_path / "records", [np.random.default_rng(0).bytes(100_000)] * 5)
    content = path.read_bytes()
    for size in (0, 1000, 3 * 2**16):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"shorter than one block|bytes at"):
            record_starts([MappedFile(path)], np.zeros(5, int), np.arange(5))


def test_rows_are_taken_as_from_an_array(tmp_path):
    rows = np.random.default_rng(0).normal(size=(7, 30_000)).astype(np.float32)
    halves = (rows[:4], rows[4:])
    paths = [
        write(tmp_path / f"{k}", [row.tobytes() for row in half]) for k, half in enumerate(halves)
    ]
    files, file_of = [MappedFile(path) for path in paths], np.repeat([0, 1], [4, 3])
    starts = record_starts(files, file_of, np.array([0, 1, 2, 3, 0, 1, 2]))
    found = MappedVectors(files, file_of, starts, 30_000, "float32")
    assert (len(found), found.shape, found.ndim, found.dtype) == (7, rows.shape, 2, rows.dtype)
    for index in (2, -1, slice(1, 6, 2), [5, 0, 0], np.arange(7) > 4, slice(0)):
        np.testing.assert_array_equal(found[index], rows[index])
    np.testing.assert_array_equal(found, rows)
    with pytest.raises(IndexError):
        found[7]
