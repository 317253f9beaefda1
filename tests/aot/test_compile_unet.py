"""The LoRA step of a two-level UNet, compiled for TPUs without one: splash attention is in it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "compile_unet.py"


pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "slice_and_mesh, heads, chips",
    [
        ("v5e:2x2,2,1,2", 2, 4),
        ("v5e:2x2,2,1,2", "2:save_attention", 4),  # no forward kernel runs twice
        ("v5p-8,1,2,2", 2, 4),
        ("v6e-4,1,1,4", 2, 4),  # 2 heads on 4 chips
        ("v5e:2x4,2,2,2", 2, 8),
        ("v5e:2x4,1,4,2", 3, 8),  # 3 heads on 2 chips
    ],
)
def test_lora_step_compiles_with_splash_attention(slice_and_mesh, heads, chips):
    pytest.importorskip("libtpu")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), f"{slice_and_mesh}:{heads}"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["fits"] and record["chips"] == chips
    # One self-attention on the way down, two on the way up; forward, dq, and dk with dv.
    assert record["pallas_kernels"] == 9
