import hashlib
import json
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files.safetensors_io import (
    atomic_write,
    encode,
    read,
    read_metadata,
    read_shapes,
    write,
    write_streamed,
)

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.half": np.ones((3, 1), np.float16),
    "a.brain": np.ones(3, ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float32),
    "empty": np.ones((0, 4), np.int64),
    "flag": np.array([True, False]),
}


def test_the_safetensors_package_reads_what_we_write_and_back(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    write(tmp_path / "a.safetensors", TENSORS, {"x": "é", "ss_v2": "False"})
    theirs = load_file(tmp_path / "a.safetensors")
    ours, metadata = read(tmp_path / "a.safetensors")
    assert set(theirs) == set(ours) == set(TENSORS)
    for name, array in TENSORS.items():
        for found in (theirs[name], ours[name]):
            assert found.dtype == array.dtype
            assert found.shape == array.shape
            np.testing.assert_array_equal(found, array)
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == metadata == read_metadata(tmp_path / "a.safetensors")
    save_file(theirs, tmp_path / "b.safetensors", {"x": "y"})
    for name, array in read(tmp_path / "b.safetensors")[0].items():
        np.testing.assert_array_equal(array, TENSORS[name])


def test_views_that_are_not_contiguous_are_stored_right(tmp_path):
    """The safetensors package's numpy writer stores garbage for these."""
    from safetensors.numpy import load_file

    square = np.arange(16, dtype=np.float32).reshape(4, 4)
    views = {
        "transposed": square.T,
        "strided": square[:, ::2],
        "reversed": square[::-1],
        "broadcast": np.broadcast_to(square[:1], (3, 4)),
        "4d": np.arange(24, dtype=np.float16).reshape(1, 2, 3, 4).transpose(3, 2, 0, 1),
    }
    write(tmp_path / "a.safetensors", views, {})
    for name, array in load_file(tmp_path / "a.safetensors").items():
        np.testing.assert_array_equal(array, views[name])


def test_bytes_depend_on_the_content_only(tmp_path):
    backwards = dict(reversed(list(TENSORS.items())))
    content = encode(TENSORS, {"a": "1", "ss_b": "2"})
    assert content == encode(backwards, {"ss_b": "2", "a": "1"})
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    header = json.loads(content[8 : 8 + size])
    body = content[8 + size :]
    assert header["__metadata__"]["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    write(tmp_path / "a.safetensors", TENSORS, {"x": "y"})
    write_streamed(tmp_path / "b.safetensors", TENSORS, TENSORS.__getitem__, {"x": "y"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert read_shapes(tmp_path / "a.safetensors")["b"] == (np.dtype("float32"), (2, 3))
    with pytest.raises(ValueError, match="expected that of `like`"):
        write_streamed(tmp_path / "c", TENSORS, lambda name: TENSORS[name][..., None], {})


def test_our_own_files_vouch_for_their_data(tmp_path):
    for texts in ({"hyperlora.spec": "x"}, {"hyperlora.spec": "x", "ss_v2": "False"}):
        content = bytearray(encode(TENSORS, texts))
        (tmp_path / "a.safetensors").write_bytes(content)
        read(tmp_path / "a.safetensors")
        content[-3] ^= 1
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="damaged or edited"):
            read(tmp_path / "a.safetensors")


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match="cannot hold dtype complex64 of a"):
        encode({"a": np.ones(2, np.complex64)}, {})


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write(path, TENSORS, {})
    before = path.read_bytes()

    def fails(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match="cannot write here \\(No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def raw(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"12345", "too few"),
        (b"PK\x03\x04" + b"0" * 60, "a zip archive"),
        (b"\x80\x02}q\x00." + b"0" * 60, "a Python pickle"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "a PNG picture, expected a .safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"GGUF" + b"0" * 60, "GGUF"),
        ((2**63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808 bytes"),
        (raw(b"{}")[:-1] + b"", "header of 2 bytes in a file of 9; cut off|too few"),
        (raw(b"not json at all"), "no valid JSON"),
        (raw(b"\xff\xfe {}"), "no valid JSON"),
        (raw(b"[" * 100_000), "no valid JSON"),
        (raw([1]), "no JSON object"),
        (raw(b'{"a":1,"a":2}'), "'a' appears twice"),
        (raw({"__metadata__": {"a": 1}}), "no map of strings"),
        (raw({"a": 3}), "needs dtype, shape and data_offsets"),
        (raw({"a": entry(dtype="F4")}, b"0" * 8), "unsupported dtype 'F4'"),
        (raw({"a": entry(dtype=["F4"])}, b"0" * 8), "unsupported dtype"),
        (raw({"a": entry(shape=(-2,))}, b"0" * 8), "has shape"),
        (raw({"a": entry(shape=(2.0,))}, b"0" * 8), "has shape"),
        (raw({"a": entry(shape=(1,) * 99)}, b"0" * 8), "has shape"),
        (raw({"a": entry(begin=-8)}, b"0" * 8), "has data_offsets"),
        (raw({"a": entry(end=16, shape=(4,))}, b"0" * 8), "lies outside the file"),
        (raw({"a": entry(shape=(3,))}, b"0" * 8), "its shape"),
        (raw({"a": entry(shape=(2**40, 2**40))}, b"0" * 8), "its shape"),
        (raw({"a": entry(), "b": entry()}, b"0" * 8), "overlaps another tensor"),
        (raw({"a": entry(), "b": entry(12, 20)}, b"0" * 20), "leaves a hole"),
        (raw({"a": entry()}, b"0" * 12), "4 bytes after the last tensor"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kept_layout_is_checked_against_every_file(tmp_path):
    """Files of one kind share a header but for the metadata; each has its own data."""
    content = encode(TENSORS, {"a": "1"})
    other = encode({name: array * 0 for name, array in TENSORS.items()}, {"b": "2"})
    for name, data in (("a", content), ("b", other)):
        (tmp_path / name).write_bytes(data)
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    assert (first[1], second[1]) == ({"a": "1"}, {"b": "2"})
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(first[0][name], array)
        np.testing.assert_array_equal(second[0][name], array * 0)
    (tmp_path / "c").write_bytes(content[:-2])
    with pytest.raises(UserError, match="lies outside the file"):
        read(tmp_path / "c")
    (tmp_path / "d").write_bytes(content + b"00")
    with pytest.raises(UserError, match="2 bytes after the last tensor"):
        read(tmp_path / "d")


@pytest.mark.parametrize(
    "text",
    [
        b'{"__metadata__":{"x":"y"},"a":E}',
        b'{"__metadata__": {"x": "y"}, "a": E}',
        b'{"a":E,"__metadata__":{"x":"y"}}',
        b' {"__metadata__":{"x":"y"} , "a":E}',
    ],
)
def test_metadata_may_stand_anywhere(tmp_path, text):
    path = tmp_path / "a.safetensors"
    text = text.replace(b"E", json.dumps(entry()).encode())
    path.write_bytes(raw(text, b"0" * 8))
    for _ in range(2):
        tensors, metadata = read(path)
        assert (list(tensors), metadata) == (["a"], {"x": "y"})
    path.write_bytes(raw(text[:-1] + b',"__metadata__":{"z":"z"}}', b"0" * 8))
    with pytest.raises(UserError, match="'__metadata__' appears twice"):
        read(path)


def test_a_zip_bomb_is_never_unpacked(tmp_path):
    path = tmp_path / "a.safetensors"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"0" * 50_000_000)
    with pytest.raises(UserError, match="a zip archive"):
        read(path)


def test_a_folder_or_a_missing_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)
