"""Copies of what lies in a bucket are of what it holds now; files are written there whole."""

import os
import stat

import pytest
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError
from tests.bucket_memory import _bucket  # noqa: F401 - a fixture


def write(address, text):
    epath.Path(address).write_text(text)


def test_a_copy_is_current_by_version_and_never_by_size(bucket, monkeypatch):
    write("gs://b/data/one", "1111")
    write("gs://b/data/deep/two", "2222")
    copy = storage.fetched("gs://b/data")
    assert (copy / "one").read_text() == "1111" and (copy / "deep" / "two").read_text() == "2222"

    copied = []
    copy_file = storage._copy
    monkeypatch.setattr(storage, "_copy", lambda a, b: copied.append(a.name) or copy_file(a, b))
    assert storage.fetched("gs://b/data") == copy and not copied
    write("gs://b/data/one", "3333")  # of the same size
    storage.fetched("gs://b/data")
    assert copied == ["one"] and (copy / "one").read_text() == "3333"

    (copy / "deep" / "two").unlink()  # lost on the disk
    epath.Path("gs://b/data/one").unlink()  # gone from the bucket
    write("gs://b/data/three", "")
    storage.fetched("gs://b/data")
    assert copied == ["one", "deep/two".rpartition("/")[2], "three"]
    assert sorted(path.name for path in copy.rglob("*") if path.is_file()) == ["three", "two"]


def test_a_single_file_and_an_interrupted_copy(bucket, monkeypatch):
    write("gs://b/x.bin", "1")
    copy = storage.fetched("gs://b/x.bin")
    assert copy.name == "x.bin" and copy.read_text() == "1"
    write("gs://b/x.bin", "2")
    write("gs://b/data/a", "1")
    write("gs://b/data/b", "1")
    copy_file = storage._copy

    def broken(source, target):
        if source.name == "b":
            raise OSError("connection lost")
        copy_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_copy", broken)
        with pytest.raises(UserError, match=r"gs://b/data: cannot be read \(connection lost\)"):
            storage.fetched("gs://b/data")
    write("gs://b/data/a", "2")
    assert (storage.fetched("gs://b/data") / "a").read_text() == "2"
    assert (storage.fetched("gs://b/data") / "b").read_text() == "1"
    assert storage.fetched("gs://b/x.bin").read_text() == "2"


def test_without_versions_everything_is_copied_again(bucket, monkeypatch):
    monkeypatch.setattr(storage, "_VERSIONS", ())
    write("gs://b/data/one", "1111")
    storage.fetched("gs://b/data")
    write("gs://b/data/one", "2222")
    assert (storage.fetched("gs://b/data") / "one").read_text() == "2222"


def test_a_replaced_file_is_whole_and_readable_by_all(tmp_path, bucket):
    old = os.umask(0o022)
    try:
        storage.replaced(tmp_path / "file", b"one", memoryview(b" two"))
    finally:
        os.umask(old)
    assert (tmp_path / "file").read_bytes() == b"one two"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    with pytest.raises(TypeError):
        storage.replaced(tmp_path / "file", b"three", "no bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"one two"
    storage.replaced("s3://b/file", b"one", b" two")
    assert epath.Path("s3://b/file").read_text() == "one two"


def test_addresses_that_cannot_be_reached_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)

    def missing(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    for scheme, package, extra in (
        ("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3"), ("abfs", "adlfs", "azure"),
        ("az", "adlfs", "azure"),
    ):  # fmt: skip
        with pytest.raises(UserError) as raised:
            storage.place(f"{scheme}://b/x")
        assert str(raised.value) == (
            f"{scheme}://b/x: needs {package}, which is not installed; "
            f"pip install 'hyperlora-jax[{extra}]'"
        )
    with pytest.raises(UserError, match=r"ftp://b/x: no address that can be read or written, exp"):
        storage.place("ftp://b/x")


def test_an_output_goes_into_the_bucket_also_when_the_command_ends_badly(bucket, tmp_path):
    with storage.output(tmp_path / "here.txt") as local:
        assert local == tmp_path / "here.txt"
    with storage.output("abfs://b/deep/a.txt") as local:
        local.write_text("1")
        local.with_name("b.txt").write_text("2")
        assert not bucket.store
    assert sorted(bucket.store) == ["/b/deep/a.txt", "/b/deep/b.txt"]
    with pytest.raises(UserError, match="half"), storage.output("gs://b/c.txt") as local:
        local.write_text("1")
        raise UserError("half of it failed")
    assert "/b/c.txt" in bucket.store
