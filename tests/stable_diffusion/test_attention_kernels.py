import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.networks.attention_kernels import (
    attend,
    attention_by_heads,
    choose,
    splash_attention,
    xla_attention,
)


def heads(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def plain(query, key, value):
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, axis=-1), value)


@pytest.mark.parametrize("attention", [xla_attention, attention_by_heads])
def test_values_and_gradients_equal_softmax_attention(attention):
    query, key, value = heads(2, 9, 3, 4), heads(2, 5, 3, 4, seed=1), heads(2, 5, 3, 4, seed=2)
    weight = heads(2, 9, 3, 4, seed=3)

    def total(attention):
        return jax.value_and_grad(lambda *x: (attention(*x) * weight).sum(), (0, 1, 2))

    ours, theirs = total(attention)(query, 9 * key, value), total(plain)(query, 9 * key, value)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_splash_equals_softmax_attention():
    query, key, value = (heads(1, 128, 2, 40, seed=i) for i in range(3))
    ours = splash_attention(query, key, value, interpret=True)
    np.testing.assert_allclose(ours, plain(query, key, value), atol=2e-3)


def test_splash_refuses_a_batch_that_the_mesh_does_not_divide():
    query = heads(3, 128, 2, 40)
    devices = np.asarray(jax.devices()[:1] * 4).reshape(2, 2, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    with pytest.raises(UserError, match="a batch of 3 cannot be split over data=2 x fsdp=2"):
        splash_attention(query, query, query, mesh)


@pytest.mark.parametrize(
    "platform, tokens, dtype, head_dim, expected",
    [
        ("tpu", 4096, jnp.bfloat16, 40, "splash"),
        ("tpu", 64, jnp.bfloat16, 40, "xla"),
        ("gpu", 64, jnp.bfloat16, 40, "cudnn"),
        ("gpu", 64, jnp.float32, 40, "xla"),
        ("gpu", 64, jnp.bfloat16, 160, "xla"),
        ("cpu", 4096, jnp.bfloat16, 40, "xla"),
        ("cpu", 256, jnp.float32, 40, "heads"),
        ("cpu", 64, jnp.float32, 40, "xla"),
    ],
)
def test_auto_chooses_by_platform_length_and_head_dim(platform, tokens, dtype, head_dim, expected):
    query = jax.ShapeDtypeStruct((1, tokens, 2, head_dim), dtype)
    assert choose(query, query, platform) == expected


def test_unknown_implementation_is_named():
    query = heads(1, 2, 1, 4)
    with pytest.raises(UserError, match="attention = 'flash'"):
        attend(query, query, query, "flash")
