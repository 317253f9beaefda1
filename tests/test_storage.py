import pytest

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError


def test_local_paths_stay_what_they_are(tmp_path):
    assert not storage.is_remote(tmp_path)
    assert storage.fetched(tmp_path / "x") == tmp_path / "x"
    assert storage.scratch(tmp_path) == tmp_path
    assert storage.local(tmp_path, "demo") == tmp_path
    assert storage.absolute(tmp_path / "a" / ".." / "b") == tmp_path / "b"
    assert str(storage.absolute("gs://bucket/run")) == "gs://bucket/run"


def test_a_bucket_s_scratch_is_one_folder_of_this_host(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path))
    first = storage.scratch("gs://bucket/run")
    assert storage.is_remote("gs://bucket/run")
    assert first.is_dir() and first.is_relative_to(tmp_path)
    assert storage.scratch("gs://bucket/run/") == first
    assert storage.scratch("gs://bucket/other") != first


def test_commands_for_a_disk_say_so():
    with pytest.raises(UserError, match=r"gs://b/r: `hyperlora demo` works in a local folder"):
        storage.local("gs://b/r", "demo")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that counts as a bucket."""
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "is_remote", lambda path: str(path).startswith(str(folder)))
    folder = tmp_path / "bucket"
    folder.mkdir()
    return folder


def test_what_is_written_for_a_bucket_arrives_there_whole(bucket, tmp_path):
    with storage.writing(bucket / "run" / "base", tmp_path) as folder:
        assert folder == tmp_path / "base"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "x").write_text("1")
        assert not (bucket / "run").exists()
    assert [path.name for path in (bucket / "run" / "base" / "deep").iterdir()] == ["x"]
    with storage.writing(tmp_path / "here", tmp_path / "scratch") as folder:
        assert folder == tmp_path / "here"
    (bucket / "file").write_text("")
    with (
        pytest.raises(UserError, match="file: cannot be written"),
        storage.writing(bucket / "file", tmp_path) as folder,
    ):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "x").write_text("1")


def test_scratch_and_bucket_follow_each_other(bucket):
    scratch = storage.scratch(bucket)
    (scratch / "spool").mkdir()
    (scratch / "spool" / "a").write_text("1")
    (scratch / "state").write_text("one")
    storage.push(bucket, "spool/a", "state")
    assert (bucket / "spool" / "a").read_text() == "1"
    # Another host has gone on: this one's copies give way, of the same size or not.
    (bucket / "state").write_text("two")
    (bucket / "spool" / "b").write_text("2")
    (bucket / "spool" / "a").unlink()
    storage.pull(bucket, "spool", "state", "prior")
    assert (scratch / "state").read_text() == "two"
    assert [path.name for path in (scratch / "spool").iterdir()] == ["b"]
    assert not (scratch / "prior").exists()
    (bucket / "spool" / "b").write_text("3")
    (bucket / "spool" / "c").write_text("4")
    storage.pull(bucket, "spool", missing_only=True)
    found = {path.name: path.read_text() for path in (scratch / "spool").iterdir()}
    assert found == {"b": "2", "c": "4"}
    (bucket / "state").unlink()
    storage.pull(bucket, "state")
    assert not (scratch / "state").exists()


def test_local_workdirs_are_neither_pulled_nor_pushed(tmp_path):
    (tmp_path / "state").write_text("one")
    storage.pull(tmp_path, "state", "nothing")
    storage.push(tmp_path, "state", "nothing")
    assert (tmp_path / "state").read_text() == "one"
