import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import spec_from_shapes
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser, denoising_loss
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params, param_shapes

from .conftest import tiny_unet_config


@pytest.fixture(scope="module")
def base():
    unet = unet_from_config(tiny_unet_config())
    return unet, init_params(unet, jax.random.key(0))


def merged(params, lora):
    """Model parameters with a LoRA's deltas added to the kernels."""
    if "kernel" in params and factors.is_site(lora):
        return {**params, "kernel": params["kernel"] + factors.delta(lora)}
    return params | {name: merged(params[name], node) for name, node in lora.items()}


def draw(spec, num=None, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        factors.zeros(spec, num),
    )


def inputs(batch, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, 8, 8, 4)).astype(np.float32)
    context = rng.standard_normal((batch, 5, 24)).astype(np.float32)
    return x, np.arange(batch) * 100, context


def test_zero_lora_is_the_base_and_merged_equals_injected(base):
    unet, params = base
    spec = spec_from_shapes(params, "all", 3)
    apply = jax.jit(unet.apply)
    plain = apply({"params": params}, *inputs(2))
    zero = factors.init(jax.random.key(1), spec, 2)
    np.testing.assert_allclose(
        apply({"params": params, "lora": zero}, *inputs(2)), plain, atol=1e-6
    )
    lora = draw(spec)
    injected = apply({"params": params, "lora": lora}, *inputs(2))
    expected = apply({"params": merged(params, lora)}, *inputs(2))
    scale = np.abs(expected).max()
    assert np.abs(injected - plain).max() > 0.1 * scale
    np.testing.assert_allclose(injected, expected, atol=1e-5 * scale)


def test_every_example_has_its_own_lora(base):
    unet, params = base
    spec = spec_from_shapes(params, "all", 2)
    lora = draw(spec, 2)
    apply = jax.jit(unet.apply)
    x, t, context = inputs(4)
    together = apply({"params": params, "lora": lora}, x, t, context)
    for k in range(4):
        one = slice(k, k + 1)
        single = {"params": params, "lora": factors.index(lora, k // 2)}
        alone = apply(single, x[one], t[one], context[one])
        np.testing.assert_allclose(together[one], alone, atol=1e-5 * np.abs(alone).max())


def test_denoising_loss_is_per_example_and_differentiable(base):
    unet, params = base
    schedule = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x, _, context = inputs(4)
    lora = draw(spec_from_shapes(params, "attn-qkvo", 2), 2)

    def loss(lora):
        text = {"states": context}
        return denoising_loss(Denoiser(unet, schedule), params, x, text, jax.random.key(3), lora)

    @jax.jit
    def of_first(lora):  # only LoRA 0 takes part
        losses, vjp = jax.vjp(loss, lora)
        return losses, vjp(jnp.array([1.0, 0, 0, 0]))[0]

    losses, gradient = of_first(lora)
    assert losses.shape == (4,)
    for leaf in jax.tree.leaves(gradient):
        assert np.abs(leaf[0]).max() > 0
        assert np.abs(leaf[1]).max() == 0


def test_bad_lora_trees_name_the_site(base):
    unet, params = base
    spec = spec_from_shapes(params, "attn-qkvo", 2)
    good = draw(spec, 2)

    def run(lora, batch=2):
        return unet.apply({"params": params, "lora": lora}, *inputs(batch))

    with pytest.raises(UserError, match=r"mid_block\.attn9\.to_q: the model has no such layer"):
        run({**good, "mid_block": {"attn9": {"to_q": {"down": 0, "up": 0}}}})
    with pytest.raises(UserError, match="batch of 3"):
        run(good, 3)
    site = spec.sites[0]
    node = good
    for name in site.module_path[:-1]:
        node = node[name]
    kept = node[site.module_path[-1]]
    node[site.module_path[-1]] = {"down": kept["down"][..., :1, :], "up": kept["up"]}
    with pytest.raises(UserError, match=f"{site.path}: down .* do not fit"):
        run(good)
    node[site.module_path[-1]] = {"down": kept["down"]}
    with pytest.raises(UserError, match=f"{site.path}: factors"):
        run(good)
    node[site.module_path[-1]] = jax.tree.map(lambda leaf: leaf[:1], kept)
    with pytest.raises(UserError, match="leading axis"):
        run(good)


def test_shapes_are_known_without_computing():
    unet = unet_from_config(tiny_unet_config())
    assert all(isinstance(s, jax.ShapeDtypeStruct) for s in jax.tree.leaves(param_shapes(unet)))
