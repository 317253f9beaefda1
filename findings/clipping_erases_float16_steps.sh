#!/usr/bin/env bash
# optax 0.2.8 with jax 0.10.2: clipping float16 gradients by their norm makes them zero.
#
# Expected: clip_by_global_norm(1.0) scales gradients down to norm 1, whatever their dtype; float16 holds numbers up to
#           65504, and gradients of 300 are far from it.
# Seen:     the squares are summed in float16. From a norm of 256 on the sum is infinite, and 1 / infinity times the
#           gradient is 0: the step is lost, where the step of a gradient a little smaller is right. No NaN, no
#           infinity, so apply_if_finite and loss scaling see a sound step. bfloat16 and float32 are right.
# Matters:  clipping is there for the rare large gradient, and float16 trainers hold gradients multiplied by a loss
#           scale of thousands. Steps go missing without a trace in the loss. Cast to float32 before the chain.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cd "$folder"
JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax.numpy as jnp
import optax

COUNT = 16


def clipped(value, dtype):
    """Norm of COUNT gradients of this value, and of what clipping to 1 leaves of them."""
    chain = optax.apply_if_finite(optax.clip_by_global_norm(1.0), max_consecutive_errors=5)
    gradient = {"w": jnp.full(COUNT, value, dtype)}
    update, state = chain.update(gradient, chain.init(gradient))
    left = float(jnp.linalg.norm(update["w"].astype(jnp.float32)))
    return value * COUNT**0.5, round(left, 2), int(state.total_notfinite)


found = {}
for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    for value in (60.0, 70.0, 300.0):
        norm, left, flagged = clipped(value, dtype)
        found[dtype.__name__, value] = left, flagged
        print(f"{dtype.__name__}: norm {norm:.0f} clipped to 1 is {left}; steps called not finite: {flagged}")
assert found["float16", 60.0] == (1.0, 0)
assert found["float16", 70.0] == found["float16", 300.0] == (0.0, 0)
for name in ("float32", "bfloat16"):
    assert all(abs(found[name, value][0] - 1) < 0.02 for value in (60.0, 70.0, 300.0))
PY
