import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from targets_fixture import SPEC, assert_same, subject

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.targets import spool
from hyperlora_jax.targets.lora_sources import Rejected


def read_all(folder):
    return [spool.read_finished(path) for path in spool.finished_files(folder).values()]


def test_finished_subjects_come_back_as_written(tmp_path):
    given = [subject(k) for k in (3, 1, 2)]
    for one in given:
        spool.write_finished(tmp_path, one)
    assert set(spool.finished_files(tmp_path)) == {one.id for one in given}
    read = read_all(tmp_path)
    assert [one.id for one in read] == sorted(one.id for one in given)
    assert_same(read[0], given[1])


def test_subject_without_lora_and_empty_spool(tmp_path):
    path = spool.write_finished(tmp_path, subject(0, lora=False))
    assert spool.read_finished(path).lora is None
    assert set(spool.finished_files(tmp_path / "nowhere")) == set()


def test_unfinished_and_foreign_files(tmp_path):
    path = spool.write_finished(tmp_path, subject(0))
    (tmp_path / f".{path.name}.77.partial").write_bytes(path.read_bytes()[:50])
    assert set(spool.finished_files(tmp_path)) == {subject(0).id}
    safetensors_io.write(tmp_path / "other.safetensors", {"x": np.zeros(3)}, {})
    with pytest.raises(UserError, match=r"other\.safetensors: is no finished subject"):
        read_all(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"other\.safetensors: .* too few for a \.safetensors"):
        read_all(tmp_path)


def test_vectors_that_are_views_are_written_in_their_own_order(tmp_path):
    vector = np.arange(2 * SPEC.num_parameters, dtype=np.float32)[::2]
    path = spool.write_finished(tmp_path, Subject("a", "a", lora=vector))
    np.testing.assert_array_equal(spool.read_finished(path).lora, vector)


def test_unwritable_spool_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write here"):
        spool.write_finished(tmp_path / "file", subject(0))


def test_killed_writer_leaves_only_whole_files(tmp_path):
    """SIGKILL at a random moment: every listed subject is whole, nothing else is listed."""
    code = (
        "import sys, itertools; sys.path.insert(0, sys.argv[1])\n"
        "from targets_fixture import subject\n"
        "from hyperlora_jax.targets import spool\n"
        "for k in itertools.count(): spool.write_finished(sys.argv[2], subject(k))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "spool")]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while len(spool.finished_files(tmp_path / "spool")) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    read = read_all(tmp_path / "spool")
    assert len(read) >= 5
    for one in read:
        assert_same(one, subject(one.seed))


@pytest.mark.parametrize(
    "name", [".hidden", "..", "a/b", "Ünï cöde", "~x%=y", "人" * 60, "x" * 400]
)
def test_no_name_loses_a_subject(tmp_path, name):
    path = spool.write_finished(tmp_path, Subject(name, name))
    assert path.parent == tmp_path and len(path.name.encode()) < 255
    assert set(spool.finished_files(tmp_path)) == {name}
    assert [one.id for one in read_all(tmp_path)] == [name]
    rejected = Rejected(name, "here", "it is odd")
    spool.write_rejected(tmp_path, rejected)
    assert spool.read_rejected(tmp_path) == {name: rejected}
    assert set(spool.finished_files(tmp_path)) == {name}
