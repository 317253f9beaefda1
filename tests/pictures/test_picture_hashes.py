"""Pictures are known by their content: moved they are the same, replaced they are others."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import picture_hashes
from hyperlora_jax.subjects.subject_pictures import load_pictures


@pytest.fixture(name="folder")
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "people"
    for k, name in enumerate(("anna", "bert")):
        (folder / name).mkdir(parents=True)
        for view in range(2):
            pixels = np.full((8, 8, 3), 40 * k + view, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{view}.png")
    return folder


def load(folder, count=2):
    section = ConfigDict({"source": str(folder), "size": 4, "skip_damaged": False})
    return load_pictures(section, count, 4)


def test_pictures_are_read_once_and_again_only_when_they_change(folder, monkeypatch):
    files = sorted(map(str, folder.glob("*/*.png")))
    first = picture_hashes.content_hashes(folder, files)
    assert len(set(first)) == 4
    read = []
    hashed = picture_hashes._hash
    monkeypatch.setattr(picture_hashes, "_hash", lambda file: read.append(file) or hashed(file))
    assert picture_hashes.content_hashes(folder, files) == first and not read
    time = Path(files[1]).stat().st_mtime_ns + 1
    shutil.copyfile(files[0], files[1])
    os.utime(files[1], ns=(time, time))  # a clock too coarse to tell would be no fault of ours
    again = picture_hashes.content_hashes(folder, files)
    assert again == [first[0], first[0], *first[2:]] and read == [files[1]]
    Path(files[0]).unlink()
    with pytest.raises(UserError, match=r"0\.png: cannot be read \(No such file"):
        picture_hashes.content_hashes(folder, files)


def test_a_damaged_or_unwritable_memory_is_made_again(folder, tmp_path, monkeypatch):
    files = sorted(map(str, folder.glob("*/*.png")))
    first = picture_hashes.content_hashes(folder, files)
    (memory,) = (tmp_path / "cache" / "picture_hashes").iterdir()
    memory.write_text("{")
    assert picture_hashes.content_hashes(folder, files) == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "file"))
    assert picture_hashes.content_hashes(folder, files) == first


def test_facts_and_marks_follow_the_content_and_not_the_place(folder, tmp_path):
    found = load(folder)
    moved = load(shutil.copytree(folder, tmp_path / "elsewhere" / "people"))
    assert moved.facts["source"] != found.facts["source"]
    assert moved.facts["pictures"] == found.facts["pictures"]
    assert moved.marks == found.marks and moved.images.mark == found.images.mark
    assert load(folder, 1).marks == found.marks[:1]
    assert load(folder, 1).facts["pictures"] != found.facts["pictures"]

    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(folder / "bert" / "1.png")
    replaced = load(folder)
    assert replaced.marks[0] == found.marks[0] and replaced.marks[1] != found.marks[1]
    assert replaced.facts["pictures"] != found.facts["pictures"]

    (folder / "anna" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat"}')
    captioned = load(folder)
    assert captioned.marks[0] != found.marks[0] and captioned.marks[1] == replaced.marks[1]

    (folder / "bert" / "metadata.jsonl").write_text('{"file_name": "0.png", "role": "reference"}')
    assert load(folder).marks[1] != replaced.marks[1], "another role is another subject"
