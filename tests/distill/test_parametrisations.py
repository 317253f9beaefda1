"""What a fit may train: factors, an added LoRA, coefficients of frozen LoRAs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.distill.parametrisations import Added, Factors, Mixture
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, validate

SPEC = LoraSpec(
    (
        LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", 6, 8, 2, "linear"),
        LoraSite("down_blocks.0.attentions.0.proj.attn2.to_k", 5, 8, 2, "linear"),
    )
)


def random_lora(seed, num_loras, spec=SPEC):
    vectors = np.random.default_rng(seed).normal(size=(num_loras, spec.num_parameters))
    return vectorize.unflatten(jnp.asarray(vectors, jnp.float32), spec)


def deltas(lora):
    return jax.tree.leaves(jax.tree.map(factors.delta, lora, is_leaf=factors.is_site))


def test_added_starts_at_the_frozen_lora_and_sums_exactly():
    start = random_lora(0, 3)
    trained = Added(SPEC, Factors(SPEC.with_rank(3), alpha=6.0))
    params = factors.repeat(trained.init(jax.random.key(0)), 3)
    lora = trained.lora(params, start, None)
    validate(lora, trained.spec)
    assert trained.spec.max_rank == 5
    for ours, theirs in zip(deltas(lora), deltas(start), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    moved = random_lora(1, 3, SPEC.with_rank(3))
    lora = trained.lora(moved, start, None)
    for total, first, second in zip(deltas(lora), deltas(start), deltas(moved), strict=True):
        np.testing.assert_allclose(total, first + 2.0 * second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per", ["global", "site", "factor"])
def test_mixture_begins_at_the_mean_and_mixes_by_group(per):
    basis = np.random.default_rng(2).normal(size=(4, SPEC.num_parameters)).astype(np.float32)
    trained = Mixture(SPEC, 4, per)
    shared = trained.arrange(basis)
    params = jax.tree.map(lambda leaf: leaf[None], trained.init(jax.random.key(0)))
    vector = vectorize.flatten(trained.lora(params, None, shared), SPEC)
    np.testing.assert_allclose(vector[0], basis.mean(axis=0), atol=1e-6)
    first = params["coefficients"].at[0, 0].set(jnp.asarray([1.0, 0.0, 0.0, 0.0]))
    changed = vectorize.flatten(trained.lora({"coefficients": first}, None, shared), SPEC)[0]
    sizes = {"global": SPEC.num_parameters, "site": 2 * 6 + 2 * 8, "factor": 2 * 6}
    wanted = basis.mean(axis=0)
    wanted[: sizes[per]] = basis[0, : sizes[per]]
    np.testing.assert_allclose(changed, wanted, atol=1e-6)


def test_unknown_mixture():
    with pytest.raises(ValueError, match="expected one of"):
        Mixture(SPEC, 4, "layer")
