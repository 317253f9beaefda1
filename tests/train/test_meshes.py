import json

import numpy as np
import pytest

from hyperlora_jax.train.json_lines import read_rows

MESHES = ["1,1,1,1", "8,1,1,8", "2,4,1,8", "2,2,2,8", "1,1,8,8"]


def losses(workdir):
    return np.asarray([row["loss"] for row in read_rows(workdir / "metrics.jsonl")])


@pytest.fixture
def runs(tmp_path, run_toy):
    arguments = [part for mesh in MESHES for part in ("--mesh", mesh)]
    done = run_toy("--workdir", tmp_path, *arguments, "--num_steps", 20, devices=8)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    return tmp_path, {report["mesh"]: report["placed"] for report in reports}


def test_every_mesh_gives_the_same_losses(runs):
    workdir, placed = runs
    reference = losses(workdir / "1-1-1-1")
    assert len(reference) == 20
    for mesh in MESHES[1:]:
        found = losses(workdir / mesh.replace(",", "-"))
        np.testing.assert_allclose(found[:5], reference[:5], rtol=1e-5, err_msg=mesh)
        np.testing.assert_allclose(found, reference, rtol=1e-3, err_msg=mesh)
    assert placed["2,2,2,8"] == ["('fsdp', 'tensor')", "()"]  # the proof was not made on copies
