import pytest

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError


def test_local_paths_stay_what_they_are(tmp_path):
    assert not storage.is_remote(tmp_path)
    assert storage.fetched(tmp_path / "x") == tmp_path / "x"
    assert storage.scratch(tmp_path) == tmp_path
    assert storage.local(tmp_path, "distill") == tmp_path


def test_a_bucket_s_scratch_is_one_folder_of_this_host(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path))
    first = storage.scratch("gs://bucket/run")
    assert storage.is_remote("gs://bucket/run")
    assert first.is_dir() and first.is_relative_to(tmp_path)
    assert storage.scratch("gs://bucket/run/") == first
    assert storage.scratch("gs://bucket/other") != first


def test_commands_for_a_disk_say_so():
    with pytest.raises(UserError, match=r"gs://b/r: `hyperlora distill` works in a local folder"):
        storage.local("gs://b/r", "distill")


def test_published_folders_are_whole(tmp_path):
    source = tmp_path / "a"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "x").write_text("1")
    storage.published(source, tmp_path / "b")
    assert (tmp_path / "b" / "deep" / "x").read_text() == "1"
    assert [path.name for path in (tmp_path / "b" / "deep").iterdir()] == ["x"]
    storage.published(source, source)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"):
        storage.published(source, tmp_path / "file")
