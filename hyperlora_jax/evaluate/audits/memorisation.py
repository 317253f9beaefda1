"""Does a generator write new LoRAs, or replay the ones it was trained on?

Distances are between deltas, centred on the training mean (all LoRAs of a base share a large
part), and computed from inner products alone, so that the same audit serves weights and anything
else that has inner products. For a kernel k with training set T, centred inner products are

  1. c(a, b) = k(a, b) - mean_t k(a, t) - mean_t k(t, b) + mean_tt' k(t, t')    `centred_products`
  2. cosine distance 1 - c(a, b) / sqrt(c(a, a) c(b, b)); with PCA, c is replaced by the inner
     product of projections on the leading components of c on T                  `distances`

Each generated LoRA's distance to its nearest training LoRA is compared with the leave-one-out
distances among training LoRAs (median ratio, KS statistic, share below the first percentile), and
with *noisy copies*: a training LoRA plus noise of half the median leave-one-out distance. A run
whose LoRAs are nearer to the training set than noisy copies fails.

Read the ratio with care: a training LoRA is identity plus the noise of its own fit, two of them
differ by two noises, a prediction without noise and a training LoRA by one. An honest generator of
noisy targets therefore lies near sqrt(1/2), below 1, and may well have a large share below the
first percentile; a copy lies near 0. That is why the noisy copies decide.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Array, Float, Params
from hyperlora_jax.lora.factors import is_site

BLOCK = 64  # LoRAs per side of a block of inner products
COPY_NOISE = 0.5  # noisy copies: noise norm as a share of the median leave-one-out distance


@dataclasses.dataclass(frozen=True)
class InnerProducts:
    """Inner products of m training members and l generated ones.

    Attributes:
      training: [m, m].
      across: [l, m].
      generated: [l], of each generated one with itself.
    """

    training: Float[np.ndarray, "m m"]
    across: Float[np.ndarray, "l m"]
    generated: Float[np.ndarray, " l"]


@dataclasses.dataclass(frozen=True, eq=False)
class Audit:
    """Outcome of the audit in one space.

    Attributes:
      space: "delta" or "pca".
      nearest: [l] distance of every generated one to its nearest training member.
      leave_one_out: [m] the same for every training member among the others.
      noisy_copy: median distance of noisy copies to their nearest training member.
      median_ratio: median(nearest) / median(leave_one_out).
      ks_statistic, ks_p: two-sample Kolmogorov-Smirnov between both.
      share_below_first_percentile: generated nearer than 99 % of leave-one-out distances.
      passed: median(nearest) is at least that of noisy copies.
    """

    space: str
    nearest: Float[np.ndarray, " l"]
    leave_one_out: Float[np.ndarray, " m"]
    noisy_copy: float
    median_ratio: float
    ks_statistic: float
    ks_p: float
    share_below_first_percentile: float
    passed: bool

    @property
    def noisy_copy_ratio(self) -> float:
        """What `median_ratio` would be for noisy copies."""
        return self.noisy_copy / max(float(np.median(self.leave_one_out)), 1e-300)

    def to_json(self) -> dict[str, object]:
        """All numbers but the two lists of distances, and their medians."""
        skipped = ("nearest", "leave_one_out")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **{name: value for name, value in fields.items() if name not in skipped},
            "median_nearest": float(np.median(self.nearest)),
            "median_leave_one_out": float(np.median(self.leave_one_out)),
            "num_generated": len(self.nearest),
            "num_training": len(self.leave_one_out),
        }


def delta_products(generated: Params, training: Params) -> InnerProducts:
    """Inner products of the deltas, summed over sites, without building any delta.

    Args:
      generated: LoRA tree with leading axis l.
      training: LoRA tree with leading axis m, same sites; ranks may differ.
    """
    return InnerProducts(
        training=delta_gram(training, training),
        across=delta_gram(generated, training),
        generated=np.diag(delta_gram(generated, generated)).copy(),
    )


def delta_gram(a: Params, b: Params) -> Float[np.ndarray, "l m"]:
    """Inner products of every delta of batch a with every delta of batch b, in blocks."""
    blocks = [
        [
            np.asarray(_gram_block(_rows(a, i, i + BLOCK), _rows(b, j, j + BLOCK)), np.float64)
            for j in range(0, _count(b), BLOCK)
        ]
        for i in range(0, _count(a), BLOCK)
    ]
    return np.block(blocks)


def vector_products(
    generated: Float[AnyArray, "l d"], training: Float[AnyArray, "m d"]
) -> InnerProducts:
    """Inner products of flat vectors (raw factors, embeddings, pictures)."""
    ours, theirs = np.asarray(generated, np.float64), np.asarray(training, np.float64)
    return InnerProducts(theirs @ theirs.T, ours @ theirs.T, np.square(ours).sum(axis=1))


def centred_products(products: InnerProducts) -> InnerProducts:
    """Equation 1: the same inner products with the training mean subtracted on both sides."""
    column, total = products.training.mean(axis=0), products.training.mean()
    own = products.across.mean(axis=1)
    return InnerProducts(
        products.training - column[None, :] - column[:, None] + total,
        products.across - own[:, None] - column[None, :] + total,
        products.generated - 2.0 * own + total,
    )


def projected_products(products: InnerProducts, num_components: int) -> InnerProducts:
    """Inner products of projections on the leading principal components of the training set.

    `products` must be centred. Kernel PCA: with training = V diag(s) V', the coordinates of a
    member are its row of products times V / sqrt(s).
    """
    values, vectors = np.linalg.eigh(products.training)
    order = np.argsort(values)[::-1][:num_components]
    order = order[values[order] > 1e-9 * max(values.max(), 1e-300)]
    basis = vectors[:, order] / np.sqrt(values[order])
    return vector_products(products.across @ basis, products.training @ basis)


def audit(products: InnerProducts, space: str = "delta") -> Audit:
    """The audit on centred inner products; see the module's text.

    Raises:
      ValueError: fewer than three training members.
    """
    from scipy.stats import ks_2samp

    count = len(products.training)
    if count < 3:
        raise ValueError(f"an audit needs at least 3 training members. Got: {count=}")
    norms = np.sqrt(np.maximum(np.diag(products.training), 1e-300))
    cosines = products.training / norms[:, None] / norms[None, :]
    np.fill_diagonal(cosines, -np.inf)
    leave_one_out = 1.0 - cosines.max(axis=1)
    ours = np.sqrt(np.maximum(products.generated, 1e-300))
    nearest = 1.0 - (products.across / ours[:, None] / norms[None, :]).max(axis=1)
    noisy = _noisy_copy_distance(float(np.median(leave_one_out)))
    statistic, p_value = ks_2samp(nearest, leave_one_out)
    first = np.quantile(leave_one_out, 0.01)
    return Audit(
        space=space,
        nearest=nearest,
        leave_one_out=leave_one_out,
        noisy_copy=noisy,
        median_ratio=float(np.median(nearest) / max(float(np.median(leave_one_out)), 1e-300)),
        ks_statistic=float(statistic),
        ks_p=float(p_value),
        share_below_first_percentile=float((nearest < first).mean()),
        passed=bool(np.median(nearest) >= noisy),
    )


def audit_loras(generated: Params, training: Params, num_components: int = 64) -> dict[str, Audit]:
    """The audit of LoRA batches in delta space and in the training set's PCA space."""
    centred = centred_products(delta_products(generated, training))
    components = min(num_components, max(2, _count(training) // 2))
    return {
        "delta": audit(centred, "delta"),
        "pca": audit(projected_products(centred, components), "pca"),
    }


def image_memorisation(
    generated: Float[AnyArray, "i c h w 3"],
    exact: Float[AnyArray, "i c h w 3"],
    training: Float[AnyArray, "i c t h w 3"],
) -> dict[str, float]:
    """Whether pictures look more like a training identity than like their own.

    Args:
      generated: pictures of i identities under c captions.
      exact: their exact renders.
      training: exact renders of t training identities under the same captions.

    Returns:
      nearer_to_training: share of pictures whose nearest training render is nearer than their own
      exact render; distance_ratio: mean distance to the own render over that to the nearest
      training render; exact_nearest: mean distance of the exact renders to the nearest training
      render, which says how near they are by nature.
    """
    pictures = np.clip(np.nan_to_num(np.asarray(generated, np.float32)), 0.0, 1.0)
    own = np.square(pictures - np.asarray(exact)).mean(axis=(2, 3, 4))
    other, natural = np.zeros_like(own), np.zeros_like(own)
    for at in np.ndindex(*own.shape):
        renders = np.asarray(training[at])
        other[at] = np.square(renders - pictures[at]).mean(axis=(1, 2, 3)).min()
        natural[at] = np.square(renders - np.asarray(exact[at])).mean(axis=(1, 2, 3)).min()
    return {
        "nearer_to_training": float((other < own).mean()),
        "distance_ratio": float(own.mean() / max(float(other.mean()), 1e-12)),
        "exact_nearest": float(natural.mean()),
    }


def _noisy_copy_distance(median: float) -> float:
    """Cosine distance of a member t to t + noise.

    A cosine distance d is a chord of length sqrt(2 d) between unit vectors; noise of length
    s = COPY_NOISE * sqrt(2 median) |t|, orthogonal to t in high dimension, leaves
    1 - 1 / sqrt(1 + s^2).
    """
    length = COPY_NOISE * np.sqrt(2.0 * median)
    return float(1.0 - 1.0 / np.sqrt(1.0 + length**2))


def _count(lora: Params) -> int:
    return jax.tree.leaves(lora)[0].shape[0]


def _rows(lora: Params, start: int, stop: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[start:stop], lora)


@jax.jit
def _gram_block(a: Params, b: Params) -> Float[Array, "l m"]:
    """<D U, D'U'> = sum_rs (D'D')_rs (U U')_rs per site, added up over sites."""

    def one(pair: Params, other: Params) -> Array:
        down = pair["down"].reshape(len(pair["down"]), -1, pair["down"].shape[-1])
        down_other = other["down"].reshape(len(other["down"]), -1, other["down"].shape[-1])
        downs = jnp.einsum("lir,mis->lmrs", down, down_other)
        ups = jnp.einsum("lro,mso->lmrs", pair["up"], other["up"])
        return jnp.sum(downs * ups, axis=(2, 3))

    sites = jax.tree.leaves(jax.tree.map(one, a, b, is_leaf=is_site))
    return functools.reduce(operator.add, sites)
