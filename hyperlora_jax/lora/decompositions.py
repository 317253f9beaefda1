"""QR and SVD of the small matrices that LoRA factors have, made of products only.

    thin_qr     classical Gram-Schmidt, every column projected twice ("twice is enough",
                Giraud et al. 2005): orthogonal to rounding
    small_svd   one-sided Jacobi (Hestenes 1958) with the round-robin order of Brent and Luk 1985:
                r/2 plane rotations at a time, relative accuracy also for small singular values
    polar       the orthogonal matrix closest to a given one, by `small_svd`

`jnp.linalg` calls LAPACK for each matrix of a batch and on a CPU (jaxlib 0.10) two such batches
in one program can wait for each other for ever; on accelerators it works through a batch one by
one. These are loops over columns of whole batches: vmap and differentiate them like any function.
"""

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, Float

SWEEPS = 12  # 8 suffice for float32 up to rank 64; a sweep over a diagonal matrix changes nothing


def thin_qr(
    matrix: Float[AnyArray, "m r"],
) -> tuple[Float[Array, "m r"], Float[Array, "r r"]]:
    """(Q, R), Q R = matrix, R upper triangular with a diagonal that is not negative.

    A column that depends on those before it, to rounding, gives a zero column of Q (a zero on R's
    diagonal): the product is kept, the columns of Q that are not zero are orthonormal.
    """
    matrix = jnp.asarray(matrix, jnp.float32)
    rank = matrix.shape[1]
    first = jnp.linalg.norm(matrix[:, :1], axis=0)
    basis = jnp.zeros_like(matrix).at[:, :1].set(matrix[:, :1] / jnp.where(first > 0, first, 1))
    triangle = jnp.zeros((rank, rank), jnp.float32).at[:1, 0].set(first)
    if rank == 1:
        return basis, triangle
    tiny = 8 * jnp.finfo(jnp.float32).eps

    def column(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        basis, triangle = state
        given = jax.lax.dynamic_index_in_dim(matrix, j, axis=1, keepdims=False)
        once = basis.T @ given
        rest = given - basis @ once
        twice = basis.T @ rest
        rest = rest - basis @ twice
        norm = jnp.linalg.norm(rest)
        norm = jnp.where(norm > tiny * jnp.linalg.norm(given), norm, 0.0)
        basis = basis.at[:, j].set(jnp.where(norm > 0, rest / jnp.where(norm > 0, norm, 1), 0.0))
        return basis, triangle.at[:, j].set(once + twice).at[j, j].set(norm)

    return jax.lax.fori_loop(1, rank, column, (basis, triangle))


def small_svd(
    matrix: Float[AnyArray, "r r"],
) -> tuple[Float[Array, "r r"], Float[Array, " r"], Float[Array, "r r"]]:
    """(U σ, σ, V) with matrix = (U σ) Vᵀ, σ descending. Columns of U where σ is 0 are not needed.

    V is orthogonal; columns of U σ are orthogonal to relative precision.
    """
    matrix = jnp.asarray(matrix, jnp.float32)
    rank = matrix.shape[1]
    if rank == 1:
        return matrix, jnp.abs(matrix[0]), jnp.ones((1, 1), jnp.float32)
    half = (rank + 1) // 2
    # Rotations of columns act on matrix and V alike: they travel stacked, an odd rank with one
    # zero column more (it is never mixed in: its inner products are 0).
    state = jnp.concatenate([matrix, jnp.eye(rank, dtype=jnp.float32)])
    state = jnp.pad(state, ((0, 0), (0, 2 * half - rank)))

    def one_round(_: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = _rotated(*pair, rank)
        if half == 1:
            return left, right
        # The first column stays, all others move on by one seat of the round table.
        return (
            jnp.concatenate([left[:, :1], right[:, :1], left[:, 1:-1]], axis=1),
            jnp.concatenate([right[:, 1:], left[:, -1:]], axis=1),
        )

    rounds = SWEEPS * (2 * half - 1)
    left, right = jax.lax.fori_loop(0, rounds, one_round, (state[:, :half], state[:, half:]))
    state = jnp.concatenate([left, right], axis=1)
    sigma = jnp.linalg.norm(state[:rank], axis=0)
    # The padding column of an odd rank is the only one whose V part is zero.
    empty = (state[rank:] == 0).all(axis=0)
    order = jnp.argsort(jnp.where(empty, 1.0, -sigma))[:rank]
    state = state[:, order]
    return state[:rank], sigma[order], state[rank:]


def _rotated(left: Array, right: Array, rows: int) -> tuple[Array, Array]:
    """Every column of `left` made orthogonal to its neighbour in `right` (in the first rows)."""
    a, b = left[:rows], right[:rows]
    alpha, beta, gamma = (a * a).sum(0), (b * b).sum(0), (a * b).sum(0)
    turn = jnp.abs(gamma) > jnp.finfo(jnp.float32).eps * jnp.sqrt(alpha * beta)
    zeta = (beta - alpha) / (2 * jnp.where(turn, gamma, 1.0))
    tangent = jnp.where(zeta < 0, -1.0, 1.0) / (jnp.abs(zeta) + jnp.sqrt(1 + zeta * zeta))
    tangent = jnp.where(turn, tangent, 0.0)
    cosine = jax.lax.rsqrt(1 + tangent * tangent)
    sine = cosine * tangent
    return cosine * left - sine * right, sine * left + cosine * right


def polar(matrix: Float[AnyArray, "r r"]) -> Float[Array, "r r"]:
    """The orthogonal matrix that maximises <Q, matrix>; the identity for a zero matrix.

    Where the matrix is singular the maximiser is not unique: the one for the matrix plus a
    rounding's worth of the identity.
    """
    matrix = jnp.asarray(matrix, jnp.float32)
    norm = jnp.linalg.norm(matrix)
    small = jnp.where(norm > 0, 1e-6 * norm, 1.0)
    columns, sigma, right = small_svd(matrix + small * jnp.eye(matrix.shape[0]))
    return (columns / jnp.where(sigma > 0, sigma, 1.0)) @ right.T
