"""Tables in files: rows, writing piece by piece, and how little memory they take."""

import re
import resource
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hyperlora_jax.batches import row_files
from hyperlora_jax.batches.row_files import RowFiles
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def write(folder, name, start, count, dtype=F32):
    """Rows start … of a table "a" [count, 2, 3] and of "b" [2 · count]; returns the file."""
    file = folder / f"{name}.safetensors"
    with safetensors_io.written_in_rows(
        file, (("a", dtype, (count, 2, 3)), ("b", np.dtype(np.int32), (2 * count,)))
    ) as put:
        for k in reversed(range(count)):
            put("a", k, np.full((1, 2, 3), start + k, dtype))
        put("b", 0, np.arange(2 * count, dtype=np.int32))
    return file


@pytest.mark.parametrize("whole", [0, 2**20])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_files_in_turn_are_one_table(tmp_path, monkeypatch, dtype, whole):
    monkeypatch.setattr(row_files, "WHOLE_BYTES", whole)
    files = [write(tmp_path, "x", 0, 4, dtype), write(tmp_path, "y", 4, 1, dtype)]
    files.append(write(tmp_path, "z", 5, 3, dtype))
    for table, length in (
        (RowFiles(files).tables()["a"], 8),
        (RowFiles(files[:1]).tables()["a"], 4),
    ):
        assert table.shape == (length, 2, 3) and len(table) == length and table.dtype == dtype
        expected = np.broadcast_to(np.arange(length)[:, None, None], table.shape).astype(dtype)
        np.testing.assert_array_equal(table[:], expected)
        np.testing.assert_array_equal(np.asarray(table), expected)
        chosen = np.array([[3, 0, 3], [length - 1, 1, 2]])
        np.testing.assert_array_equal(table[chosen], expected[chosen])
        np.testing.assert_array_equal(table[2], expected[2])
        np.testing.assert_array_equal(table[1:4], expected[1:4])
        assert table[3:3].shape == (0, 2, 3)
        with pytest.raises(IndexError):
            _ = table[np.array([length])]


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        safetensors_io.written_in_rows(tmp_path / "x.safetensors", (("a", BF16, (3, 2)),)) as put,
    ):
        put("a", 0, np.zeros((2, 2), BF16))
        raise KeyboardInterrupt
    assert not (tmp_path / "x.safetensors").exists()
    with safetensors_io.written_in_rows(tmp_path / "x.safetensors", (("a", BF16, (3, 2)),)) as put:
        with pytest.raises(ValueError, match="rows float32"):
            put("a", 0, np.zeros((3, 2), np.float32))
        with pytest.raises(ValueError, match="rows bfloat16"):
            put("a", 2, np.zeros((2, 2), BF16))
        put("a", 0, np.ones((3, 2), BF16))
    (file,) = tmp_path.iterdir()
    np.testing.assert_array_equal(safetensors_io.read(file)[0]["a"], np.ones((3, 2), BF16))
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        safetensors_io.written_in_rows(tmp_path / "file" / "x", (("a", BF16, (3, 2)),)),
    ):
        pass


def test_more_files_than_a_process_may_open_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "WHOLE_BYTES", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(list(Path("/proc/self/fd").iterdir())) + 8
    files = [write(tmp_path, f"{k:02d}", k, 1) for k in range(20)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        table = RowFiles(files).tables()["a"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert table[[0, 19]][:, 0, 0].tolist() == [0, 19]


def test_damaged_and_unlike_files_are_named(tmp_path):
    good, bad = write(tmp_path, "good", 0, 2), write(tmp_path, "bad", 2, 2)
    bad.write_bytes(bad.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"bad\.safetensors: .* lies outside the file"):
        RowFiles([good, bad])
    with pytest.raises(UserError, match=r"other\.safetensors: holds"):
        RowFiles([good, write(tmp_path, "other", 0, 2, BF16)])
    with pytest.raises(UserError, match=r"gone\.safetensors: cannot be read"):
        RowFiles([tmp_path / "gone.safetensors"])


def test_a_file_that_is_cut_off_while_it_is_open_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "WHOLE_BYTES", 0)
    file = write(tmp_path, "x", 0, 4)
    table = RowFiles([file]).tables()["a"]
    with file.open("r+b") as opened:
        opened.truncate(200)
    with pytest.raises(UserError, match=r"x\.safetensors: ends at byte"):
        _ = table[:]


def resident():
    """Bytes of this process in memory: its own, and those of mapped files."""
    status = Path("/proc/self/status").read_text()
    return [
        1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("RssAnon", "RssFile")
    ]


def test_a_table_larger_than_its_memory(tmp_path, monkeypatch):
    """128 MiB are read in shuffled order; what stays is a sixteenth of it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(row_files, "WHOLE_BYTES", 2**26)
    row, files = np.zeros((1, 2**17), np.float32), []
    for k in range(4):
        files.append(tmp_path / f"{k}.safetensors")
        kind = ("a", row.dtype, (64, row.shape[1]))
        with safetensors_io.written_in_rows(files[-1], (kind,)) as put:
            for number in range(64):
                put("a", number, row + 64 * k + number)
    table = RowFiles(files).tables()["a"]
    order = np.random.default_rng(0).permutation(len(table))
    before, most, total = resident(), [0, 0], 0.0
    for chosen in order.reshape(-1, 4):
        total += float(table[chosen][:, -1].sum())
        most = [max(pair) for pair in zip(most, resident(), strict=True)]
    assert total == sum(range(256))
    assert len(table) * row.nbytes == 2**27
    grown = [a - b for a, b in zip(most, before, strict=True)]
    assert sum(grown) < 2**23, grown
