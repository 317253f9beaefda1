import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.lora.decompositions import polar, small_svd, thin_qr


def spread(random, rows, rank, condition):
    """Random matrix with singular values from 1 down to 1 / condition."""
    left, _ = np.linalg.qr(random.standard_normal((rows, rank)))
    right, _ = np.linalg.qr(random.standard_normal((rank, rank)))
    sigma = np.geomspace(1, 1 / condition, rank)
    return ((left * sigma) @ right).astype(np.float32), sigma


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 17])
def test_qr_of_batches(rank):
    random = np.random.default_rng(rank)
    batch = np.stack([spread(random, 40, rank, c)[0] for c in (1, 1e2, 1e5)])
    basis, triangle = jax.vmap(thin_qr)(batch)
    np.testing.assert_allclose(basis @ triangle, batch, atol=1e-6)
    np.testing.assert_allclose(jnp.swapaxes(basis, 1, 2) @ basis, np.stack([np.eye(rank)] * 3),
                               atol=2e-6)  # fmt: skip
    assert (jnp.tril(triangle, -1) == 0).all() and (jnp.diagonal(triangle, 0, 1, 2) >= 0).all()


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 17, 40])
def test_svd_of_batches(rank):
    random = np.random.default_rng(rank)
    given = [spread(random, rank, rank, c) for c in (1, 1e2, 1e5)]
    batch = np.stack([matrix for matrix, _ in given])
    columns, sigma, right = jax.vmap(small_svd)(batch)
    np.testing.assert_allclose(columns @ jnp.swapaxes(right, 1, 2), batch, atol=3e-6)
    wanted = np.linalg.svd(batch.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(sigma, wanted, atol=2e-6)
    unit = columns / sigma[:, None]
    for side in (unit, right):
        product = jnp.swapaxes(side, 1, 2) @ side
        np.testing.assert_allclose(product, np.stack([np.eye(rank)] * 3), atol=5e-4)


def test_dependent_columns_and_zeros_keep_the_product():
    random = np.random.default_rng(0)
    some = random.standard_normal((30, 3)).astype(np.float32)
    for matrix in (
        np.concatenate([some, some @ random.standard_normal((3, 4)).astype(np.float32)], axis=1),
        np.concatenate([0 * some, some], axis=1),
        0 * some,
    ):
        basis, triangle = thin_qr(matrix)
        assert np.isfinite(basis).all()
        np.testing.assert_allclose(basis @ triangle, matrix, atol=1e-5)
        columns, sigma, right = small_svd(np.asarray(triangle))
        np.testing.assert_allclose(columns @ right.T, triangle, atol=1e-5)
        wanted = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(sigma, wanted, atol=1e-5)


def test_polar_is_orthogonal_even_where_the_matrix_is_singular():
    random = np.random.default_rng(0)
    square = random.standard_normal((5, 5)).astype(np.float32)
    left, _, right = np.linalg.svd(square)
    np.testing.assert_allclose(polar(square), left @ right, atol=1e-4)
    singular = square.copy()
    singular[:, 2:] = 0
    for matrix in (singular, 0 * square):
        turn = polar(matrix)
        np.testing.assert_allclose(turn.T @ turn, np.eye(5), atol=1e-4)
    np.testing.assert_allclose(polar(0 * square), np.eye(5), atol=1e-6)
    wanted = np.linalg.svd(singular, compute_uv=False).sum()
    np.testing.assert_allclose((polar(singular) * singular).sum(), wanted, rtol=1e-4)


def test_no_lapack_call_is_left_in_the_program():
    """What hangs on CPUs: batched LAPACK calls in one program."""

    def both(x):
        basis, triangle = thin_qr(x)
        return basis, small_svd(triangle), polar(triangle)

    text = jax.jit(jax.vmap(both)).lower(jnp.zeros((4, 9, 3))).as_text()
    assert "custom_call" not in text
