"""The published weights2weights matrix is 26 GB: importing it must not need its size in memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SHAPE = (64_974, 99_648)
NUM_ROWS = 8000  # 3.2 GB, well over the limit, then the test has seen enough
LIMIT = 2**31
PROGRAM = """
import itertools, resource, sys
from pathlib import Path
from hyperlora_jax.targets import lora_import, lora_sources
sys.path.insert(0, "tools")
from bench_data import w2w_spec
matrix, out, num_rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
read_matrix = lora_sources.read_matrix
lora_sources.read_matrix = lambda *args: itertools.islice(read_matrix(*args), num_rows)
reader = lora_sources.FileReader(w2w_spec())
report = lora_import.import_loras([matrix], out, reader, progress=False)
print(report.imported, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_matrix_of_26_gb_is_imported_in_2_gib(tmp_path):
    path = tmp_path / "all_weights.npy"
    matrix = np.lib.format.open_memmap(path, "w+", np.float32, SHAPE)  # sparse: zeros cost no disk
    random = np.random.default_rng(0)
    for start in range(0, NUM_ROWS, 100):
        matrix[start] = random.normal(size=SHAPE[1])
    matrix.flush()
    del matrix
    assert path.stat().st_size > 25.8e9
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROGRAM, str(path), str(tmp_path / "out"), str(NUM_ROWS)]
    ran = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, check=True
    )
    imported, peak = map(int, ran.stdout.split())
    assert imported == NUM_ROWS
    assert peak <= LIMIT, f"{peak / 2**30:.2f} GiB"
