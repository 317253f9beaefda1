"""tools/rehearse.py: stand-in subjects, linked files, limits; and the tiny rehearsal itself."""

import copy
import importlib.util
import json
import pathlib
import types

import numpy as np
import pytest

TOOLS = pathlib.Path(__file__).parents[2] / "tools"
HOST = {
    "base": 2**20,
    "peaks": {
        "encoding": 3 * 2**20,
        "first step": 9 * 2**20,
        "steps": 10 * 2**20,
        "end": 5 * 2**20,
    },
    "begins": {"end": 4 * 2**20},
    "data_wait": [0.1],
}


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rehearse():
    return tool("rehearse")


@pytest.fixture(scope="module")
def host():
    return tool("rehearse_host")


def test_drawn_subjects_are_made_of_their_number(host):
    one, again, other = (np.stack(host.pictures(k, (16, 24))) for k in (3, 3, 4))
    assert one.shape == (host.VIEWS, 16, 24, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, again)
    assert len({picture.tobytes() for picture in (*one, *other)}) == 2 * host.VIEWS
    found = host.listed("", [(16, 16)], 30)
    assert len({subject.captions[0] for subject in found}) == 30
    assert {np.shape(subject.pixels()) for subject in found} == {(host.VIEWS, 16, 16, 3)}


def test_files_of_as_many_rows_are_names_of_the_first(host, tmp_path):
    made = []
    make = host.linking(lambda part, file, *_: made.append(file) or file.write_bytes(b"rows"))
    part = types.SimpleNamespace(name="latents", counts=[8] * 5)
    files = [tmp_path / str(k) for k in range(3)]
    for file, subjects in zip(files, (range(2), range(2, 4), range(4, 5)), strict=True):
        make(part, file, subjects, 8)
    assert made == [files[0], files[2]]
    assert files[1].samefile(files[0]) and not files[2].samefile(files[0])


def test_what_the_first_step_adds_is_no_host_s(rehearse):
    host = copy.deepcopy(HOST)
    assert rehearse.beyond_base(host) == 3 * 2**20  # 2 before the loop, 1 in it or at the end
    host["peaks"]["first step"] = host["peaks"]["steps"] = 2**40
    assert rehearse.beyond_base(host) == 3 * 2**20


def legs():
    leg = {"hosts": [HOST], "losses": [1.0] * 20, "first_step_seconds": 3.0, "seconds": 9.0}
    found = {
        name: copy.deepcopy(leg)
        for name in ("preempted", "gone on", "undisturbed", "encoding 1", "encoding 4")
    }
    found["preempted"]["losses"] = [1.0] * 11
    return found


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda legs: None, []),
        (lambda legs: legs["gone on"]["hosts"][0]["peaks"].update(steps=18 * 2**20), ["beyond"]),
        (lambda legs: legs["gone on"]["hosts"][0]["peaks"].update(end=13 * 2**20), ["beyond"]),
        (lambda legs: legs["encoding 4"]["hosts"][0]["peaks"].update(encoding=2**23), ["more"]),
        (lambda legs: legs["preempted"].update(losses=[1.0] * 20), ["step of"]),
        (lambda legs: legs["gone on"].update(losses=[1.0] * 19 + [1.01]), ["losses"]),
        (lambda legs: legs["gone on"].update(losses=[1.0] * 19), ["steps without"]),
    ],
)
def test_a_limit_that_is_passed_is_told(rehearse, change, passed):
    made = legs()
    change(made)
    found = [row["what"] for row in rehearse.limits(made, 10.0, 4.0) if not row["holds"]]
    assert len(found) == len(passed)
    assert all(what.startswith(name) for what, name in zip(found, passed, strict=True))


@pytest.mark.slow
def test_the_tiny_rehearsal(rehearse, tmp_path, capsys):
    given = ["--subjects", "40", "--size", "tiny", "--workdir", str(tmp_path), "--growth_mib", "64"]
    assert rehearse.main([*given, "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    first = written["hosts"][0]
    assert first["device_bytes"]["batch"] > 0 and first["peak_mib"] > first["base_mib"]
    assert len(written["losses"]["preempted"]) < len(written["losses"]["gone on"]) == 20
    capsys.readouterr()
    assert rehearse.main([*given, "--limit_gib", "0.001"]) == 1  # no leg is run again
    said = capsys.readouterr().out
    assert said.count("done before") == 5 and "PASSED beyond the base" in said
