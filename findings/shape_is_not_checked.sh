#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 with jax 0.10.2: whether a restored array must have the asked shape depends on its container.
#
# Expected: StandardCheckpointer.restore(FOLDER, target) refuses a checkpoint whose shapes are not those of the
#           target, as it refuses missing and unknown names.
# Seen:     only where the target holds jax.Array (or a ShapeDtypeStruct with a sharding). Where it holds NumPy arrays,
#           or ShapeDtypeStruct alone for what was saved from NumPy, (4, 6) comes back for (2, 6) or (24,), without a
#           word; the asked dtype is cast to all the same (1.9 to 1 for int8).
# Matters:  adapters and averages are often held on the host as NumPy, and factors of another rank multiply as well as
#           those of the right one: a LoRA of rank 4 read into settings of rank 8 is applied with alpha / 8.
#           Compare the shapes after restoring.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu venv/bin/python - 2>log.txt <<'PY' || { tail -n 20 log.txt >&2; exit 1; }
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.CRITICAL)
HERE = Path.cwd()
checkpointer = ocp.StandardCheckpointer()
checkpointer.save(HERE / "numpy", {"w": np.full((4, 6), 1.9, np.float32)})
checkpointer.save(HERE / "jax", {"w": jnp.full((4, 6), 1.9, jnp.float32)})
checkpointer.wait_until_finished()
placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def restored(saved, target):
    """Shape that comes back, or "refused"."""
    try:
        return checkpointer.restore(HERE / saved, {"w": target})["w"].shape
    except ValueError as error:
        assert "is not compatible with the stored shape" in str(error), error
        return "refused"


targets = {
    "NumPy": np.zeros((2, 6), np.float32),
    "NumPy, 1 axis": np.zeros(24, np.float32),
    "ShapeDtypeStruct": jax.ShapeDtypeStruct((2, 6), jnp.float32),
    "ShapeDtypeStruct with a sharding": jax.ShapeDtypeStruct((2, 6), jnp.float32, sharding=placed),
    "jax.Array": jnp.zeros((2, 6)),
}
found = {name: [restored(saved, target) for saved in ("numpy", "jax")] for name, target in targets.items()}
for name, results in found.items():
    print(f"(4, 6) saved from NumPy / from JAX, target of another shape in {name}: {results}")
small = checkpointer.restore(HERE / "numpy", {"w": np.zeros((2, 6), np.int8)})["w"]
print("1.9 as int8:", small[0, 0], small.dtype)
assert found["NumPy"] == found["NumPy, 1 axis"] == [(4, 6), (4, 6)]
assert found["ShapeDtypeStruct"][0] == (4, 6)
assert found["jax.Array"] == found["ShapeDtypeStruct with a sharding"] == ["refused", "refused"]
assert small.dtype == np.int8 and small.shape == (4, 6) and small[0, 0] == 1
PY
