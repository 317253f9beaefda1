"""Gradients with respect to LoRA factors, and what the compiled training step may not contain."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import site_factors, spec_from_shapes
from hyperlora_jax.stable_diffusion import denoising_loss
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser, draw_noise, lora_losses
from hyperlora_jax.stable_diffusion.networks.blocks import REMAT_POLICIES
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params

from .conftest import flax_params, nchw, tiny_unet_config, torch_unet

BATCH, RANK = 3, 5
CONFIG = tiny_unet_config(block_out_channels=[32, 64])


@pytest.fixture(scope="module")
def setting():
    theirs = torch_unet(CONFIG)
    unet = unet_from_config(dict(theirs.config))
    params = flax_params(theirs, unet)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, 8, 8, 4)).astype(np.float32)
    states = rng.standard_normal((BATCH, 7, 24)).astype(np.float32)
    return theirs, unet, params, (x, np.array([1, 400, 999]), states)


def draw(spec, num=None):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32),
        factors.zeros(spec, num),
    )


def loss(unet, lora, params, x, t, states):
    return jnp.square(unet.apply({"params": params, "lora": lora}, x, t, states)).mean()


def test_gradients_equal_peft_autograd(setting):
    from peft import LoraConfig, inject_adapter_in_model

    theirs, unet, params, (x, t, states) = setting
    spec = spec_from_shapes(params, "all", RANK)
    lora = draw(spec)
    gradient = jax.jit(jax.grad(loss, 1), static_argnums=0)(unet, lora, params, x, t, states)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[s.path for s in spec])
    inject_adapter_in_model(config, theirs)
    modules = dict(theirs.named_modules())

    def torch_layout(array):
        array = np.asarray(array)
        return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)

    pairs = []
    with torch.no_grad():
        for site in spec:
            module = modules[site.path]
            for side, layer in (("down", module.lora_A), ("up", module.lora_B)):
                weight = layer["default"].weight
                value = torch_layout(site_factors(lora, site)[side])
                weight.copy_(torch.from_numpy(value.reshape(weight.shape).copy()))
                pairs.append((site, side, weight))
    out = theirs(nchw(x), torch.from_numpy(t), torch.from_numpy(states)).sample
    expected = torch.autograd.grad(out.square().mean(), [weight for *_, weight in pairs])
    for (site, side, weight), theirs_gradient in zip(pairs, expected, strict=True):
        ours = torch_layout(site_factors(gradient, site)[side]).reshape(weight.shape)
        error = np.linalg.norm(ours - theirs_gradient.numpy())
        assert error <= 1e-4 * np.linalg.norm(theirs_gradient.numpy()), (site.path, side)


def test_compiled_step_holds_no_merged_weight_and_costs_two_forwards(setting):
    _, unet, params, inputs = setting
    inputs = [np.repeat(a, 2, 0) for a in inputs]  # 6 examples, 6 LoRAs
    lora = draw(spec_from_shapes(params, "attn-qkvo", 2), 6)
    step = jax.jit(jax.grad(loss, 1), static_argnums=0).lower(unet, lora, params, *inputs)
    text = step.as_text()
    kernels = {k.shape for k in jax.tree.leaves(params) if k.ndim == 2}
    shapes = set(re.findall(r"tensor<([0-9x]+)xf32>", text))
    merged = {f"6x{i}x{o}" for i, o in kernels if min(i, o) > 2 and (i, o) not in ((64, 32),)}
    activations = {f"6x{n}x{c}" for n in (64, 16, 7) for c in (24, 32, 64, 128, 256, 512)}
    assert not shapes & (merged - activations)
    forward = jax.jit(unet.apply).lower({"params": params}, *inputs)
    flops = step.cost_analysis()["flops"] / forward.cost_analysis()["flops"]
    assert flops <= 2.1  # tiny widths: norms and softmax weigh more than in a real UNet


@pytest.fixture(scope="module")
def small():
    """One level: compiles fast."""
    config = tiny_unet_config(
        block_out_channels=[16],
        down_block_types=["CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D"],
        mid_block_type="UNetMidBlock2D",
    )
    unet = unet_from_config(config)
    return unet, init_params(unet, jax.random.key(0))


def test_remat_policies_recompute_and_change_nothing_else(small, setting):
    unet, params = small
    inputs = setting[-1]
    lora = draw(spec_from_shapes(params, "attn-qkvo", 2))
    run = jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)
    lowered = {p: run.lower(unet.clone(remat=p), lora, params, *inputs) for p in REMAT_POLICIES}
    barriers = {p: low.as_text().count("optimization_barrier") for p, low in lowered.items()}
    assert barriers["none"] == 0
    assert min(barriers[p] for p in REMAT_POLICIES[1:]) > 0
    scores = {p: low.as_text().count("exponential") for p, low in lowered.items()}
    assert scores["save_attention"] < scores["block"] or scores["none"] < scores["full"]
    ours = lowered["full"].compile()(lora, params, *inputs)
    plain = lowered["none"].compile()(lora, params, *inputs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_close(small, setting):
    unet, params = small
    inputs = setting[-1]
    half = unet.clone(dtype=jnp.bfloat16)
    params16 = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    ours = jax.jit(half.apply)({"params": params16}, *inputs)
    exact = jax.jit(unet.apply)({"params": params}, *inputs)
    assert ours.dtype == jnp.bfloat16
    assert np.linalg.norm(ours.astype(np.float32) - exact) <= 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("loras", "images", "devices", "split"),
    [
        (4, 2, 1, (1, (4, 1))),
        (1, 6, 1, (1, (1, 3))),
        (1, 6, 3, (3, (1, 2))),
        (1, 6, 6, (6, (1, 1))),
        (1, 6, 4, (1, (1, 1))),
    ],
)
def test_losses_in_parts_equal_those_of_the_whole_batch(
    small, setting, monkeypatch, loras, images, devices, split
):
    unet, params = small
    spec = spec_from_shapes(params, "attn-qkvo", 2)
    lora = draw(spec, loras)
    denoiser = Denoiser(unet, NoiseSchedule())
    rng = np.random.default_rng(2)
    rows = (loras, images)
    latents = rng.standard_normal((*rows, 8, 8, 4)).astype(np.float32)
    text = {"states": rng.standard_normal((*rows, 7, 24)).astype(np.float32)}
    drawn = draw_noise(denoiser, latents, jax.random.key(0))
    weights = np.linspace(0.1, 1, images, dtype=np.float32)
    by = jnp.arange(1.0, loras + 1)

    def total(lora, params):
        sums, errors = lora_losses(denoiser, params, lora, (latents, text, *drawn), weights)
        return (by * sums).sum(), (sums, errors)

    def run(devices, numbers, split):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        monkeypatch.setattr(denoising_loss, "NUMBERS_AT_ONCE", numbers)
        assert denoising_loss._split_by(unet, *rows, 8, 8) == split
        return jax.jit(jax.grad(total, has_aux=True))(lora, params)

    copies, parts = split
    together = loras * images // (copies * max(parts))
    whole = run(1, 0, (1, (1, 1)))
    in_parts = run(devices, together * 8 * 8 * unet.settings.channels[0], split)
    for a, b in zip(jax.tree.leaves(in_parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
