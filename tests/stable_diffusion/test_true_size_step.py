"""The LoRA training step at the true size of SD 1.5, by lowering shapes: no weights in memory."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import spec_from_shapes
from hyperlora_jax.lora_files.base_files import read_json
from hyperlora_jax.stable_diffusion.networks import attention
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.flax_trees import param_shapes

BATCH, RANK = 2, 8
UNET = unet_from_config(
    read_json(Path(__file__).parents[2] / "configs/bases/sd15/unet/config.json")
).clone(attention="xla")


def loss(lora, params, *inputs):
    return jnp.square(UNET.apply({"params": params, "lora": lora}, *inputs)).mean()


def lowered(preset, size):
    """(forward, gradient step, kernels' shapes), one LoRA per example, as a TPU gets them: what a
    CPU gets writes some products so that their FLOPs cannot be read off before compilation."""
    params = param_shapes(UNET)
    spec = spec_from_shapes(params, preset, RANK)
    lora = jax.eval_shape(lambda: factors.zeros(spec, BATCH))
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((BATCH, size, size, 4), (BATCH,), (BATCH, 77, 768))
    ]
    forward = jax.jit(UNET.apply).trace({"params": params}, *inputs)
    step = jax.jit(jax.grad(loss)).trace(lora, params, *inputs)
    forward, step = (traced.lower(lowering_platforms=("tpu",)) for traced in (forward, step))
    kernels = {leaf.shape for leaf in jax.tree.leaves(params) if len(leaf.shape) > 1}
    return forward, step, kernels


def attention_flops(monkeypatch, size):
    """FLOPs of all products q kᵀ and p v of one forward pass."""
    found = []
    original = attention.attend
    params = param_shapes(UNET)

    def record(query, key, *rest):
        found.append(4 * query.size * key.shape[1])
        return original(query, key, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend", record)
        shapes = (BATCH, size, size, 4), (BATCH,), (BATCH, 77, 768)
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        jax.eval_shape(UNET.apply, {"params": params}, *inputs)
    assert len(found) == 32
    return sum(found)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_a_step_costs_two_forwards(size, monkeypatch):
    """A layer with frozen weights costs its forward again in the backward pass. Attention's two
    products have no weights: each has two gradients. At 512² (latents of 64²), where they are 16 %
    of the forward pass, the floor is two forwards and attention's products once more."""
    forward, step, _ = lowered("attn-qkvo", size)
    once, flops = forward.cost_analysis()["flops"], step.cost_analysis()["flops"]
    floor = 2 * once
    if size == 64:
        assert 0.75e12 < once / BATCH < 0.85e12
        floor += attention_flops(monkeypatch, size)
    assert flops <= 1.02 * floor


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["attn-qkvo", "all"])
def test_no_merged_weight_and_no_base_gradient(preset):
    _, step, kernels = lowered(preset, 32)
    text = step.as_text()
    arrays = set(re.findall(r"tensor<((?:[0-9]+x)+)f32>", text))
    for shape in kernels:
        for ordered in (shape, (*shape[:-2], shape[-1], shape[-2])):
            merged = "x".join(map(str, (BATCH, *ordered))) + "x"
            assert merged not in arrays
    # A gradient of a kernel is a product or a convolution whose result has the kernel's dimensions.
    results = re.findall(
        r"stablehlo\.(?:dot_general|convolution).*-> tensor<((?:[0-9]+x)+)f32>", text
    )
    assert len(results) > 500
    dimensions = {tuple(sorted(map(int, result[:-1].split("x")))) for result in results}
    assert not dimensions & {tuple(sorted(shape)) for shape in kernels}
