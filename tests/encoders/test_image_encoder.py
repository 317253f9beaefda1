import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.encoders.image_encoder import ConvEncoder, init_encoder

SMALL = ConvEncoder(image_size=16, widths=(8, 16), embedding_dim=24, pool_channels=4, groups=4)
apply = jax.jit(SMALL.apply)


@pytest.fixture(scope="module")
def params():
    return init_encoder(SMALL, jax.random.key(0))


def test_shapes_and_scale(params):
    pooled, tokens = apply({"params": params}, np.random.default_rng(0).random((3, 16, 16, 3)))
    assert pooled.shape == (3, 24) and tokens.shape == (3, SMALL.num_tokens, 24)
    np.testing.assert_allclose(pooled.mean(axis=-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(tokens.std(axis=-1), 1.0, atol=1e-2)


def test_pictures_do_not_influence_each_other(params):
    images = np.random.default_rng(0).random((4, 16, 16, 3), np.float32)
    together, _ = apply({"params": params}, images)
    alone, _ = apply({"params": params}, images[2:3])
    np.testing.assert_allclose(together[2:3], alone, atol=1e-4)


def test_enlarged_pixels_encode_like_the_original(params):
    small = np.random.default_rng(0).random((1, 16, 16, 3), np.float32)
    large = small.repeat(3, axis=1).repeat(3, axis=2)
    expected = apply({"params": params}, small)[0]
    np.testing.assert_allclose(apply({"params": params}, large)[0], expected, atol=1e-4)


def test_other_sizes_are_resized(params):
    grey = np.full((1, 21, 21, 3), 0.3, np.float32)
    expected = apply({"params": params}, grey[:, :16, :16])[0]
    np.testing.assert_allclose(apply({"params": params}, grey)[0], expected, atol=1e-4)


def test_embedding_knows_where(params):
    left, right = np.zeros((2, 1, 16, 16, 3), np.float32)
    left[:, 4:8, 2:6], right[:, 4:8, 10:14] = 1.0, 1.0
    a, b = (apply({"params": params}, x)[0] for x in (left, right))
    assert float(jnp.abs(a - b).max()) > 0.05


def test_default_is_small_enough():
    module = ConvEncoder()
    shapes = jax.eval_shape(lambda: init_encoder(module, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 1_000_000


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"image_size": 30}, "divisible by 4"), ({"widths": (12, 16)}, "groups must divide")],
)
def test_wrong_sizes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        init_encoder(ConvEncoder(**kwargs), jax.random.key(0))
