"""The basis of the orthogonal head is a constant: computed once, in no program, no parameter."""

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.hypernet.token_layout import Head, frozen_basis, make_layout
from hyperlora_jax.lora.sites import LoraSite, LoraSpec

SPEC = LoraSpec((LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", 24, 16, 2, "linear"),))
GROUP = next(group for group in make_layout(SPEC).groups if group.width == 24)


def head():
    return Head(GROUP, components=2, kind="orthogonal", basis_size=8, zero=False)


def test_values_are_those_that_every_forward_pass_used_to_compute():
    basis = frozen_basis(8, 24)
    drawn = jax.nn.initializers.orthogonal()(jax.random.key(2307_06949), (8, 24))
    np.testing.assert_array_equal(basis, drawn)
    np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=1e-6)
    assert frozen_basis(8, 24) is basis


def test_no_forward_or_backward_pass_decomposes_a_matrix():
    frozen_basis.cache_clear()  # the first tracing is the one that computes it
    x = jnp.ones((3, 1, 5))
    params = head().init(jax.random.key(0), x)["params"]
    assert list(params) == ["mix"]
    frozen_basis.cache_clear()

    def total(params):
        return head().apply({"params": params}, x).sum()

    program = jax.jit(jax.value_and_grad(total)).lower(params)
    for text in (str(jax.make_jaxpr(jax.grad(total))(params)), program.as_text()):
        for name in ("qr", "geqrf", "householder", "random_bits", "threefry"):
            assert name not in text.lower()
    drawn = jax.nn.initializers.orthogonal()(jax.random.key(2307_06949), (8, 24))
    mix = x[:, 0] @ params["mix"]["kernel"] + params["mix"]["bias"]
    wanted = np.einsum("lrk,kw->lrw", mix.reshape(3, 2, 8), drawn)
    np.testing.assert_allclose(head().apply({"params": params}, x)[:, 0], wanted, atol=1e-5)
