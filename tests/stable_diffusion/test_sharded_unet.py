import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def on_eight_devices(script, *arguments):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "cases",
    [
        ["xla:2,2,2:3"],  # 3 heads divide by no tensor axis
        # splash runs in Pallas' interpreter here
        pytest.param(["xla:1,1,8:2", "splash:2,2,2:3", "splash:2,2,2:2"], marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_result_of_one(cases):
    rows = on_eight_devices("sharded_unet.py", *cases)
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert row["error"] <= 1e-5, row["case"]
        assert "tensor" in row["placed"]  # the proof was not made on copies


@pytest.mark.parametrize(
    "meshes", [["2,2,2"], pytest.param(["4,1,2", "1,2,4"], marks=pytest.mark.slow)]
)
def test_pictures_do_not_depend_on_the_mesh(meshes):
    for row in on_eight_devices("sharded_sampling.py", *meshes):
        assert row["devices"] == 8
        assert row["error"] <= 1e-4 < row["spread"]
