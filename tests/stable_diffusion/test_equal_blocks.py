import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSpec, spec_from_shapes
from hyperlora_jax.stable_diffusion.networks.blocks import stack_blocks
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params

from .conftest import tiny_unet_config

DEPTH = 3


@pytest.fixture(scope="module")
def base():
    config = tiny_unet_config(
        block_out_channels=[16],
        down_block_types=["CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D"],
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=DEPTH,
        use_linear_projection=True,
    )
    unet = unet_from_config(config)
    rng = np.random.default_rng(0)
    inputs = (
        rng.standard_normal((4, 4, 4, 4)).astype(np.float32),
        np.arange(4) * 100,
        rng.standard_normal((4, 5, 24)).astype(np.float32),
    )
    return unet, init_params(unet, jax.random.key(0)), inputs


def uneven_lora(params, num=2):
    """Ranks that differ between blocks, and no LoRA on some sites of the middle one."""
    sites = []
    for site in spec_from_shapes(params, "attn-ff", 2):
        if "transformer_blocks.1.ff" in site.path:
            continue
        rank = 3 if "transformer_blocks.2.attn1" in site.path else 2
        sites.append(type(site)(**{**vars(site), "rank": rank}))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        factors.zeros(LoraSpec(tuple(sites)), num),
    )


def test_scan_with_lora_equals_no_scan_and_differs_from_the_base(base):
    unet, params, inputs = base

    def run(unet, params, lora):
        def loss(lora):
            out = unet.apply({"params": params, "lora": lora}, *inputs)
            return jnp.square(out).mean(), out

        gradient, out = jax.grad(loss, has_aux=True)(lora)
        return out, gradient

    run = jax.jit(run, static_argnums=0)
    lora = uneven_lora(params)
    plain = run(unet, params, lora)
    # With rematerialisation, which goes with a scan like with any other block.
    scanned = unet.clone(scan=True, remat="save_attention")
    found = run(scanned, stack_blocks(params), lora)
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    apply = jax.jit(unet.clone(scan=True).apply)
    as_they_are = apply({"params": params, "lora": lora}, *inputs)
    np.testing.assert_allclose(as_they_are, plain[0], atol=1e-5 * np.abs(plain[0]).max())
    without = apply({"params": params}, *inputs)
    assert np.abs(without - plain[0]).max() > 0.05 * np.abs(without).max()


def test_a_scanned_program_holds_one_block(base):
    unet, params, inputs = base

    def products(unet):
        return jax.jit(unet.apply).lower({"params": params}, *inputs).as_text().count("dot_general")

    in_block = 4 + 2 + 4 + 2 + 2  # two attentions with two products each, feed-forward
    transformers = 3
    assert products(unet) - products(unet.clone(scan=True)) == transformers * (DEPTH - 1) * in_block


def test_stacked_parameters_come_back(base):
    unet, params, inputs = base
    stacked = stack_blocks(params)
    node = stacked["down_blocks_0"]["attentions_0"]
    assert node["transformer_blocks"]["attn1"]["to_q"]["kernel"].shape == (DEPTH, 16, 16)
    blocks = params["down_blocks_0"]["attentions_0"]
    for i in range(DEPTH):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], node["transformer_blocks"])
        jax.tree.map(np.testing.assert_array_equal, own, blocks[f"transformer_blocks_{i}"])
    beyond = {"down_blocks_0": {"attentions_0": {f"transformer_blocks_{DEPTH}": {}}}}
    site = {"attn1": {"to_q": {"down": np.zeros((16, 2)), "up": np.zeros((2, 16))}}}
    beyond["down_blocks_0"]["attentions_0"][f"transformer_blocks_{DEPTH}"] = site
    with pytest.raises(UserError, match=r"transformer_blocks\.3\.attn1\.to_q: the model has no"):
        unet.clone(scan=True).apply({"params": stacked, "lora": beyond}, *inputs)
