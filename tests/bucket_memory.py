"""A bucket of every kind in this process's memory, for commands that run in it."""

import sys
from typing import Any, ClassVar

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

SCHEMES = ("gs", "gcs", "s3", "az", "abfs")


class Bucket(MemoryFileSystem):
    """Objects by address without its scheme; each write has another time of creation."""

    protocol = SCHEMES
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).partition("://")[2].strip("/") if "://" in str(path) else str(path)


@pytest.fixture(name="bucket")
def _bucket(tmp_path, monkeypatch):
    """`bucket.store` maps "/b/x" to what lies at gs://b/x."""
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
    for scheme in SCHEMES:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield Bucket
    backend.fsspec_backend._get_filesystem.cache_clear()
