import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import sharding
from hyperlora_jax.parallel.mesh import AXES, make_mesh
from hyperlora_jax.parallel.sharding import Rule, param_shardings


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def spec_of(shape, mesh, rules=sharding.DEFAULT_RULES):
    return param_shardings({"kernel": jnp.zeros(shape)}, mesh, rules)["kernel"].spec


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 8), PartitionSpec("fsdp", "tensor")),
        ((3, 3, 8, 8), PartitionSpec(None, None, "fsdp", None)),
        ((2, 8), PartitionSpec("tensor", "fsdp")),
        ((5, 8), PartitionSpec(None, "fsdp")),
        ((5, 2), PartitionSpec(None, "tensor")),
        ((5, 5), PartitionSpec()),
        ((8,), PartitionSpec()),
        ((), PartitionSpec()),
    ],
)
def test_first_alternative_that_divides_wins(shape, expected):
    assert spec_of(shape, abstract_mesh(1, 4, 2)) == expected


def test_attention_is_split_by_heads_and_by_what_it_reads_or_writes():
    shapes = {
        "self_attention": {
            "query": {"kernel": jnp.zeros((3, 8, 2, 5)), "bias": jnp.zeros((3, 2, 5))},
            "out": {"kernel": jnp.zeros((3, 2, 5, 8))},
        },
        "mlp_in": {"kernel": jnp.zeros((3, 8, 16))},
        "mlp_out": {"kernel": jnp.zeros((3, 16, 8))},
    }
    found = param_shardings({"blocks": shapes}, abstract_mesh(1, 4, 2))["blocks"]
    attention = found["self_attention"]
    assert attention["query"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert attention["query"]["bias"].spec == PartitionSpec()
    assert attention["out"]["kernel"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert found["mlp_in"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert found["mlp_out"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")


def test_the_first_rule_counts_and_uncovered_names_are_listed():
    rules = (Rule(r"a/.*", ((None,),)), Rule(r".*/kernel", (("fsdp",),)))
    tree = {"a": {"kernel": jnp.zeros(4), "bias": jnp.zeros(4)}, "b": {"kernel": jnp.zeros(4)}}
    found = param_shardings(tree, abstract_mesh(1, 4, 1), rules)
    assert found["a"]["kernel"].spec == PartitionSpec(None)
    assert found["b"]["kernel"].spec == PartitionSpec("fsdp")
    with pytest.raises(ValueError, match=r"Uncovered: \['b/bias'\]"):
        param_shardings({**tree, "b": {"bias": jnp.zeros(1)}}, abstract_mesh(1, 1, 1), rules)


def test_indivisible_batch_is_an_error():
    with pytest.raises(UserError, match="batch of 6 examples cannot be split over data=2 x fsdp=2"):
        sharding.process_rows(abstract_mesh(2, 2, 1), 6)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(UserError, match="batch of 0 examples"):
        sharding.put_batch({"x": np.zeros((0, 3))}, mesh)


def test_batch_of_unequal_leaves_is_an_error():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"leading axes differ: \{'x': 2, 'y': 3\}"):
        sharding.put_batch({"x": np.zeros((2, 1)), "y": np.zeros((3, 1))}, mesh)


def test_put_batch_keeps_the_values():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    batch = {"x": np.arange(6, dtype=np.float32).reshape(3, 2)}
    np.testing.assert_array_equal(sharding.put_batch(batch, mesh)["x"], batch["x"])
    np.testing.assert_array_equal(sharding.host_rows(mesh, 3), range(3))


def test_table_says_where_parameters_live():
    tree = {"a": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}}
    mesh = abstract_mesh(1, 4, 2)
    text = sharding.describe(tree, param_shardings(tree, mesh))
    assert "('fsdp', 'tensor')" in text
    assert "a/kernel" in text
