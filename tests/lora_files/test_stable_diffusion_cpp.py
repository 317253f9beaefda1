"""stable-diffusion.cpp draws the same with our file as with the merged checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_image_is_that_of_the_merged_checkpoint(tmp_path):
    """Some minutes, 9 GB of disk; builds the client's environment in .venv-sdcpp once."""
    record = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "tools" / "sdcpp_client.py"), "--work", str(tmp_path),
               "--environment", str(ROOT / ".venv-sdcpp"), "--json", str(record)]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
    found = json.loads(record.read_text())
    assert found["tensors_applied"] == [[1050, 1050]]
    levels = found["levels_of_255_from_merged"]
    assert levels.pop("our file")["max"] <= 1
    assert set(levels) == {"base", "alpha 1", "no text encoder"}
    assert all(case["mean"] > 3 for case in levels.values())
