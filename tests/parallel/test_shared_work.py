"""Rows shared out over real processes, and the plain calls of a single one."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.parallel import multihost, shared_work

PROGRAM = """
import json, sys
import jax, numpy as np
from hyperlora_jax.parallel import multihost, shared_work

multihost.start()
asked = []
def make(rows):
    asked.extend(rows.tolist())
    return {"square": rows.astype(np.float32) ** 2, "name": np.stack([rows, rows], 1).astype("i4")}

every = shared_work.shared_rows(5, make)
first = jax.process_index() == 0
found = shared_work.of_first(lambda: np.full((2, 3), 7.0) if first else 1 / 0)
print(json.dumps({
    "asked": asked,
    "padded": shared_work.own_rows(5, 4).tolist(),
    "square": every["square"].tolist(),
    "name": every["name"].tolist(),
    "found": found.tolist(),
    "none": shared_work.of_first(lambda: None),
    "devices": shared_work.local_mesh().size,
    "first": multihost.is_first(),
}))
"""


def test_two_processes_share_rows_and_what_the_first_one_finds(as_hosts):
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, **flags, **own},
            stdout=subprocess.PIPE,
            text=True,
        )
        for own in as_hosts()
    ]
    printed = [process.communicate(timeout=200)[0] for process in running]
    first, second = (json.loads(text.splitlines()[-1]) for text in printed)
    assert first["asked"] == [0, 1, 2] and second["asked"] == [3, 4, 4]
    assert first["padded"] == [0, 1, 2, 3] and second["padded"] == [4, 4, 4, 4]
    for name in ("square", "name", "found", "none"):
        assert first[name] == second[name]
    assert first["square"] == [0.0, 1.0, 4.0, 9.0, 16.0]
    assert first["name"] == [[k, k] for k in range(5)]
    assert first["found"] == [[7.0] * 3] * 2 and first["none"] is None
    assert first["devices"] == second["devices"] == 2
    assert first["first"] and not second["first"]


def test_a_single_process_makes_all_rows():
    every = shared_work.shared_rows(3, lambda rows: jnp.asarray(rows, jnp.float32) * 2)
    np.testing.assert_array_equal(every, [0.0, 2.0, 4.0])
    assert shared_work.own_rows(3, 2).tolist() == [0, 1, 2, 2]
    assert multihost.is_first() and shared_work.of_first(lambda: None) is None


def test_numbers_that_would_lose_digits_are_refused():
    with pytest.raises(ValueError, match="float64"):
        shared_work.gathered(2, np.zeros((2, 1)))
