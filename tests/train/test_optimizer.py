"""Muon: what it trains, and that its steps are those of PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
import torch
from toy_task import fit_toy

from hyperlora_jax.train.optimizer import ITERATIONS, make_optimizer, matrices

Axes = optax.contrib.MuonDimensionNumbers
RATE = {"learning_rate": 0.1, "schedule": "constant", "clip_norm": None}


def test_kernels_are_matrices_and_all_else_is_left_to_adamw():
    def kernel(*shape):
        return {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}

    found = matrices(
        {
            "block_0": {"self_attention": {"query": kernel(8, 2, 4), "out": kernel(2, 4, 8)}},
            "blocks": {"self_attention": {"query": kernel(3, 8, 2, 4)}, "mlp": kernel(3, 8, 32)},
            "conv": kernel(3, 3, 4, 8),
            "conv_in": kernel(3, 3, 4, 8),
            "head_up_32": kernel(5, 8, 16),
            "embed_site": jnp.zeros((5, 8)),
        }
    )
    axes = {
        "/".join(key.key for key in path[:-1]): (spec.reduction_axis, spec.output_axis)
        for path, spec in jax.tree_util.tree_leaves_with_path(
            found, is_leaf=lambda x: type(x) is not dict and x is not None
        )
    }
    assert axes == {
        "block_0/self_attention/query": ((-3,), (-2, -1)),
        "block_0/self_attention/out": ((-3, -2), (-1,)),
        "blocks/self_attention/query": ((-3,), (-2, -1)),
        "blocks/mlp": ((-2,), (-1,)),
        "conv": ((-4, -3, -2), (-1,)),
        "head_up_32": ((-2,), (-1,)),
    }


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_steps_are_those_of_pytorch(shape):
    """PyTorch orthogonalises in bfloat16, hence the tolerance."""
    rng = np.random.default_rng(0)
    start, *gradients = rng.standard_normal((6, *shape)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(start.T.copy()))
    optimizer = torch.optim.Muon(
        [theirs],
        lr=0.1,
        weight_decay=0.02,
        adjust_lr_fn="match_rms_adamw",
        ns_steps=ITERATIONS,
    )
    params = {"kernel": jnp.asarray(start)}
    transform, _ = make_optimizer(5, name="muon", weight_decay=0.02, **RATE)
    state = transform.init(params)
    for gradient in gradients:
        theirs.grad = torch.from_numpy(gradient.T.copy())
        optimizer.step()
        updates, state = transform.update({"kernel": jnp.asarray(gradient)}, state, params)
        params = {"kernel": params["kernel"] + updates["kernel"]}
    moved = theirs.detach().numpy().T - start
    error = np.linalg.norm(params["kernel"] - start - moved) / np.linalg.norm(moved)
    assert error < 0.08


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    given = {"optimizer": {**RATE, "name": "muon"}}
    whole = fit_toy(tmp_path / "whole", **given)
    fit_toy(tmp_path / "parts", num_steps=5, **given)
    parts = fit_toy(tmp_path / "parts", **given)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
