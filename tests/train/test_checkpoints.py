import jax
import numpy as np
import pytest
from toy_task import fit_toy

from hyperlora_jax.errors import UserError
from hyperlora_jax.train.checkpoints import check_facts, restore_params


def test_parameters_alone(tmp_path):
    state = fit_toy(tmp_path)
    params, meta = restore_params(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, state.ema)
    assert meta["step"] == 12
    assert meta["facts"] == {"spec": "abc"}
    params, _ = restore_params(tmp_path, step=10)
    assert not np.array_equal(params["out"]["kernel"], state.ema["out"]["kernel"])


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"checkpoints of steps \[\], expected one"):
        restore_params(tmp_path)


def test_missing_and_additional_facts_differ():
    check_facts({"a": [1, 2]}, {"a": (1, 2)}, "here")
    with pytest.raises(UserError, match="here was made with b = None, this run has b = 3"):
        check_facts({"a": 1}, {"a": 1, "b": 3}, "here")
