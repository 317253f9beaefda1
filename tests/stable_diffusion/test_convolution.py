"""The convolution's gradients against XLA's own, and that no slow form of them is left."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hyperlora_jax.stable_diffusion.networks import convolutions
from hyperlora_jax.stable_diffusion.networks.blocks import kernel_shape
from hyperlora_jax.stable_diffusion.networks.convolutions import conv2d, flax_conv2d, product
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params

from .conftest import tiny_unet_config

CASES = [
    (3, 1, ((1, 1), (1, 1)), 8),
    (3, 2, ((1, 1), (1, 1)), 8),
    (3, 2, ((0, 1), (0, 1)), 8),
    (3, 2, ((1, 1), (1, 1)), 7),
    (3, 1, ((0, 2), (2, 0)), 5),
    (4, 2, ((1, 1), (2, 1)), 9),
    (1, 2, ((0, 0), (0, 0)), 6),
    (1, 1, ((0, 0), (0, 0)), 6),
]


@pytest.mark.parametrize(("size", "stride", "padding", "pixels"), CASES)
def test_gradients_equal_xlas_own(size, stride, padding, pixels):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, pixels, pixels, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 5)), jnp.float32)

    def plain(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=numbers
        )

    def loss(function):
        return lambda x, kernel: jnp.sin(function(x, kernel)).sum()

    ours = jax.grad(loss(lambda x, k: conv2d(x, k, stride, padding)), (0, 1))(x, kernel)
    xlas = jax.grad(loss(plain), (0, 1))(x, kernel)
    for a, b in zip(ours, xlas, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (2, 0))])
def test_few_pixels_and_a_large_kernel_are_one_product_with_the_same_gradient(padding, monkeypatch):
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(2, 4, 3, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 5)), jnp.float32)

    def values(x, kernel):
        out, back = jax.vjp(lambda x, kernel: conv2d(x, kernel, 1, padding), x, kernel)
        return out, back(jnp.sin(out))

    wanted = values(x, kernel)
    monkeypatch.setattr(convolutions, "_LARGE", 1)
    assert "convolution" not in jax.jit(lambda x: conv2d(x, kernel, 1, padding)).lower(x).as_text()
    for ours, plain in zip(*map(jax.tree.leaves, (values(x, kernel), wanted)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_platforms_get_the_form_that_is_fast_there():
    def loss(x, kernel):
        return conv2d(x, kernel, 1, ((1, 1), (1, 1))).sum()

    gradient = jax.jit(jax.grad(loss)).trace(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)))
    swapped = "[b, 0, 1, f]x[0, 1, o, i]"
    assert swapped not in gradient.lower(lowering_platforms=("cpu",)).as_text()
    assert swapped in gradient.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (2, "SAME"), (2, ((0, 1), (1, 0)))])
def test_flax_layers_take_it(stride, padding):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 9, 6, 3)), jnp.float32)
    options = {"features": 5, "kernel_size": (3, 3), "strides": stride, "padding": padding}
    plain, fast = nn.Conv(**options), nn.Conv(**options, conv_general_dilated=flax_conv2d)
    params = jax.jit(plain.init)(jax.random.key(0), x)

    def gradients(module):
        def total(p, x):
            return jnp.sin(module.apply(p, x)).sum()

        return jax.jit(jax.grad(total, (0, 1)))(params, x)

    np.testing.assert_allclose(fast.apply(params, x), plain.apply(params, x), atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, map(gradients, (fast, plain))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_flax_layers_that_it_cannot_compute_are_refused():
    module = nn.Conv(4, (3, 3), feature_group_count=2, conv_general_dilated=flax_conv2d)
    with pytest.raises(ValueError, match="one group"):
        module.init(jax.random.key(0), jnp.ones((1, 4, 4, 4)))


def test_products_of_few_rows_with_a_large_kernel_have_the_usual_gradients():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, 3, 1024)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(1024, 1024)), jnp.float32)

    def gradients(multiply):
        return jax.grad(lambda x, k: jnp.sin(multiply(x, k)).sum(), (0, 1))(x, kernel)

    for ours, plain in zip(gradients(product), gradients(jnp.matmul), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-3)
    program = jax.jit(gradients, static_argnums=0).trace(product)
    assert "optimization_barrier" in program.lower(lowering_platforms=("cpu",)).as_text()
    assert "optimization_barrier" not in program.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 3)])
def test_transformed_kernels_give_the_same_convolution_and_gradient(size):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 5)), jnp.float32)

    def values(function, kernel):
        out, back = jax.vjp(lambda x: function(x, kernel), x)
        return out, back(jnp.sin(out))

    wanted = values(lambda x, k: conv2d(x, k, 1, ((1, 1), (1, 1))), kernel)
    found = values(convolutions.transformed_conv, convolutions.transformed(kernel))
    for ours, plain in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


def test_a_frozen_unet_with_transformed_kernels_predicts_the_same():
    unet = unet_from_config(tiny_unet_config())
    params = jax.jit(lambda key: init_params(unet, key))(jax.random.key(0))
    frozen = convolutions.frozen(params, fewest=1)
    names = [path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(frozen)[0]]
    assert names.count(convolutions.TRANSFORMED) == 9
    assert "kernel" in frozen["mid_block"]["resnets_0"]["conv1"]
    inputs = [jnp.ones((1, 8, 8, 4)), jnp.array([7.0]), jnp.ones((1, 3, 24))]
    predict = jax.jit(unet.apply)
    wanted, found = (predict({"params": tree}, *inputs) for tree in (params, frozen))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    path = ("up_blocks_1", "resnets_0", "conv1")
    assert kernel_shape(frozen, path) == kernel_shape(params, path)
    small = convolutions.frozen(params)
    assert jax.tree.structure(small) == jax.tree.structure(params)
