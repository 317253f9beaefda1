"""Generators without training by gradient: what a hypernetwork has to beat.

    Mean           the mean training LoRA
    Neighbours     mean of the k training LoRAs whose references are most alike; k = 1 is the
                   nearest neighbour
    Ridge          kernel ridge regression from embedding to LoRA
    PcaGaussian    independent normal coefficients on principal components, blind to the condition
                   (weights2weights' way to sample, arXiv 2406.09413)

Each is fitted once (`fit(embeddings, vectors)` gives its constants; only those that blend training
LoRAs hold all of them in memory) and then is a `Generator` like
all others, without trainable parameters. Guidance g gives mean + g · (LoRA - mean): what predicts
by averaging shrinks to the mean, so g is a hyper-parameter of theirs as strength is.

LoRAs are averaged as raw factors (`space="raw"`: they should share one initialisation or gauge), or
as deltas that are then cut back to their rank (`space="delta"`).

LoRA vectors need not fit into memory: they are rows of arrays or of files, read in chunks.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Array, DType, Float, Params, Rows
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.hypernet.generators import Draw, Estimate
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSpec, site_factors, tree_from_sites

CHUNK = 512  # vectors in memory at a time, twice for inner products


def chunks(vectors: Rows) -> Iterator[slice]:
    """Slices of at most `CHUNK` rows, one after another."""
    starts = range(0, len(vectors), CHUNK)
    return (slice(start, min(start + CHUNK, len(vectors))) for start in starts)


def mean_vector(vectors: Rows) -> Float[np.ndarray, " d"]:
    """Mean of vectors [t, d], to the last bit that of the whole array."""
    total = np.zeros(vectors[:1].shape, np.float32)
    for rows in chunks(vectors):
        total = np.concatenate([total, vectors[rows]]).sum(axis=0, keepdims=True)
    return total[0] / np.float32(len(vectors))


def gram_matrix(
    vectors: Rows, centre: Float[np.ndarray, " d"], dtype: DType
) -> Float[np.ndarray, "t t"]:
    """Inner products of vectors [t, d] less `centre`, counted in `dtype`, as float64."""
    products = np.empty((len(vectors), len(vectors)))
    for a in chunks(vectors):
        left = (vectors[a] - centre).astype(dtype)
        for b in chunks(vectors):
            if b.start > a.start:
                break
            right = left if b == a else (vectors[b] - centre).astype(dtype)
            products[a, b] = left @ right.T
            products[b, a] = products[a, b].T
    return products


def combined(
    weights: Float[np.ndarray, "k t"], vectors: Rows, centre: Float[np.ndarray, " d"]
) -> Float[np.ndarray, "k d"]:
    """weights @ (vectors - centre)."""
    total = np.zeros((len(weights), len(centre)))
    for rows in chunks(vectors):
        total += weights[:, rows] @ (vectors[rows] - centre)
    return total


SPACES = ("raw", "delta")
PENALTIES = tuple(10.0**k for k in range(-4, 4))


def unit(embeddings: Float[AnyArray, "n e"]) -> Float[AnyArray, "n e"]:
    """Embeddings of length 1, of numpy or JAX as they come."""
    lengths = (embeddings**2).sum(axis=1, keepdims=True) ** 0.5
    return embeddings / (lengths + 1e-9)


@dataclasses.dataclass(frozen=True)
class Fitted(abc.ABC):
    """What all of them share: no parameters, no training by gradient."""

    spec: LoraSpec

    stochastic = False
    needs_targets = True

    def init(self, key: Array, condition: Condition) -> Params:
        """No trainable parameters."""
        del key, condition
        return {}

    @abc.abstractmethod
    def fit(self, embeddings: Float[np.ndarray, "t e"], vectors: Rows) -> Params:
        """Constants, from the training subjects' embeddings and LoRA vectors."""

    @abc.abstractmethod
    def sample(
        self, params: Params, constants: Params, condition: Condition, key: Array, draw: Draw
    ) -> Params:
        """See `Generator`."""

    def train(
        self,
        params: Params,
        constants: Params,
        condition: Condition,
        target: Array | None,
        key: Array,
    ) -> Estimate:
        """Raises ValueError: it is fitted, not trained."""
        raise ValueError(f"{type(self).__name__} is fitted in closed form, it has no training step")


@dataclasses.dataclass(frozen=True)
class Mean(Fitted):
    """The same LoRA for everyone."""

    def fit(self, embeddings: Float[np.ndarray, "t e"], vectors: Rows) -> Params:
        """Constants."""
        del embeddings
        return {"mean": mean_vector(vectors)}

    def sample(
        self, params: Params, constants: Params, condition: Condition, key: Array, draw: Draw
    ) -> Params:
        """See `Generator`."""
        del params, key, draw
        mean = jnp.broadcast_to(
            constants["mean"], (len(condition.pooled), self.spec.num_parameters)
        )
        return vectorize.unflatten(mean, self.spec)


@dataclasses.dataclass(frozen=True)
class Blend(Fitted):
    """LoRAs that are weighted sums of training LoRAs; the weights of a subject sum to 1."""

    space: str = "raw"

    def __post_init__(self):
        if self.space not in SPACES:
            raise ValueError(f"Got: {self.space=}, expected one of {SPACES}")

    def weights(self, constants: Params, pooled: Float[Array, "l e"]) -> Float[Array, "l t"]:
        """Share of every training LoRA."""
        raise ValueError(f"{type(self).__name__} says no weights")

    def sample(
        self, params: Params, constants: Params, condition: Condition, key: Array, draw: Draw
    ) -> Params:
        """See `Generator`."""
        del params, key
        weights = self.weights(constants, condition.pooled)
        weights = 1.0 / weights.shape[1] + draw.guidance * (weights - 1.0 / weights.shape[1])
        if self.space == "raw":
            return vectorize.unflatten(weights @ constants["vectors"], self.spec)
        return blend_deltas(weights, constants["vectors"], self.spec)


@dataclasses.dataclass(frozen=True)
class Neighbours(Blend):
    """Softmax over cosine similarity / temperature among the `num_neighbours` most alike."""

    num_neighbours: int = 1
    temperature: float = 0.1

    def fit(self, embeddings: Float[np.ndarray, "t e"], vectors: Rows) -> Params:
        """Constants."""
        if not 1 <= self.num_neighbours <= len(vectors):
            raise UserError(
                f"model.baseline.num_neighbours: got {self.num_neighbours}, expected 1 to the "
                f"{len(vectors)} training LoRAs"
            )
        return {"embeddings": unit(embeddings), "vectors": np.asarray(vectors)}

    def weights(self, constants: Params, pooled: Float[Array, "l e"]) -> Float[Array, "l t"]:
        """See `Blend`."""
        asked = unit(pooled)
        similarity = asked @ constants["embeddings"].T
        values, chosen = jax.lax.top_k(similarity, self.num_neighbours)
        share = jax.nn.softmax(values / self.temperature, axis=1)
        rows = jnp.arange(len(pooled))[:, None]
        return jnp.zeros_like(similarity).at[rows, chosen].set(share)


@dataclasses.dataclass(frozen=True)
class Ridge(Blend):
    """Kernel ridge regression around the mean, with the kernel exp((cos - 1) / width).

    The penalty is the one of `PENALTIES` whose leave-one-out predictions point most nearly in the
    direction of the targets (mean cosine of what is left of the mean; size is left to strength).
    """

    kernel_width: float = 0.5

    def fit(self, embeddings: Float[np.ndarray, "t e"], vectors: Rows) -> Params:
        """Constants."""
        directions = unit(embeddings)
        kernel = np.asarray(self._kernel(directions, directions), np.float64)
        gram = gram_matrix(vectors, mean_vector(vectors), np.float64)
        scores = {p: _leave_one_out_cosine(kernel, gram, p) for p in PENALTIES}
        penalty = max(scores, key=lambda p: scores[p])
        inverse = np.linalg.inv(kernel + penalty * np.eye(len(kernel)))
        return {
            "embeddings": directions,
            "vectors": np.asarray(vectors),
            "inverse": inverse.astype(np.float32),
            "penalty": np.float32(penalty),
        }

    def _kernel(self, a: AnyArray, b: AnyArray) -> AnyArray:
        module = np if isinstance(a, np.ndarray) else jnp
        return module.exp((a @ b.T - 1.0) / self.kernel_width)

    def weights(self, constants: Params, pooled: Float[Array, "l e"]) -> Float[Array, "l t"]:
        """See `Blend`."""
        asked = unit(pooled)
        raw = self._kernel(asked, jnp.asarray(constants["embeddings"])) @ constants["inverse"]
        # mean + Σ raw (v - mean): the shares of the vectors themselves.
        return raw + (1.0 - raw.sum(axis=1, keepdims=True)) / raw.shape[1]


def _leave_one_out_cosine(kernel: np.ndarray, gram: np.ndarray, penalty: float) -> float:
    """Mean cosine between targets and their leave-one-out predictions, from inner products alone.

    With A = (K + λI)⁻¹ the left-out residual of target i is (A Y)_i / A_ii, so its prediction is
    Y_i minus that: a weighted sum of targets, whose inner products are those of `gram`.
    """
    inverse = np.linalg.inv(kernel + penalty * np.eye(len(kernel)))
    weights = np.eye(len(kernel)) - inverse / np.diag(inverse)[:, None]
    across = np.einsum("ij,ij->i", weights, gram)
    norms = np.einsum("ij,jk,ik->i", weights, gram, weights, optimize=True)
    scale = np.sqrt(np.maximum(norms * np.diag(gram), 1e-30))
    return float(np.mean(across / scale))


@dataclasses.dataclass(frozen=True)
class PcaGaussian(Fitted):
    """mean + Σ_k σ_k ε_k component_k, ε standard normal."""

    num_components: int = 128

    stochastic = True

    def fit(self, embeddings: Float[np.ndarray, "t e"], vectors: Rows) -> Params:
        """Constants."""
        del embeddings
        mean = mean_vector(vectors)
        components, spread = principal_components(vectors, mean, self.num_components)
        return {"mean": mean, "components": components, "spread": spread}

    def sample(
        self, params: Params, constants: Params, condition: Condition, key: Array, draw: Draw
    ) -> Params:
        """See `Generator`; the condition only says how many."""
        del params
        spread = constants["spread"]
        drawn = jax.random.normal(key, (len(condition.pooled), len(spread))) * spread
        vectors = constants["mean"] + draw.guidance * drawn @ constants["components"]
        return vectorize.unflatten(vectors, self.spec)


def principal_components(
    vectors: Rows, mean: Float[np.ndarray, " d"], count: int
) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, " k"]]:
    """Orthonormal directions of largest variance, and the standard deviation along each.

    From the t×t inner products: vectors are long and few.
    """
    values, left = np.linalg.eigh(gram_matrix(vectors, mean, np.float32))
    order = np.argsort(values)[::-1][: min(count, len(vectors) - 1)]
    order = order[values[order] > 1e-6 * values.max()]
    weights = (left[:, order] / np.sqrt(values[order])).T
    components = combined(weights, vectors, mean)
    spread = np.sqrt(values[order] / max(len(vectors) - 1, 1))
    return components.astype(np.float32), spread.astype(np.float32)


def blend_deltas(
    weights: Float[Array, "l t"], vectors: Float[Array, "t d"], spec: LoraSpec
) -> Params:
    """Σ_t weight · delta_t per site, cut back to the site's rank by SVD; balanced factors."""
    loras = vectorize.unflatten(vectors, spec)
    return tree_from_sites(
        {
            site.path: blend_site(weights, site_factors(loras, site), site.rank)
            for site in spec.sites
        }
    )


@functools.partial(jax.jit, static_argnames="rank")
def blend_site(weights: Float[AnyArray, "l t"], pairs: Params, rank: int) -> Params:
    """`blend_deltas` of one site, whose factors are known [t, ...].

    Builds one LoRA's delta at a time (in×out): fitting data is small, and this is no training loss.
    """
    down = jnp.reshape(pairs["down"], (len(pairs["down"]), -1, pairs["down"].shape[-1]))
    up = jnp.asarray(pairs["up"])

    def one(row: Array) -> tuple[Array, Array]:
        delta = jnp.einsum("tir,tro->io", row[:, None, None] * down, up)
        left, sigma, right = jnp.linalg.svd(delta, full_matrices=False)
        keep = min(rank, len(sigma))
        root = jnp.sqrt(sigma[:keep])
        more = rank - keep
        return (
            jnp.pad(left[:, :keep] * root, ((0, 0), (0, more))),
            jnp.pad(root[:, None] * right[:keep], ((0, more), (0, 0))),
        )

    downs, ups = jax.lax.map(one, jnp.asarray(weights))
    return {"down": downs.reshape(len(weights), *pairs["down"].shape[1:-1], rank), "up": ups}


BASELINES = ("mean", "nearest", "knn", "ridge", "pca_gaussian")


def make_baseline(
    name: str,
    spec: LoraSpec,
    space: str = "raw",
    num_neighbours: int = 20,
    temperature: float = 0.1,
    kernel_width: float = 0.5,
    num_components: int = 128,
) -> Fitted:
    """A baseline by name; one of `BASELINES`."""
    if name == "mean":
        return Mean(spec)
    if name == "nearest":
        return Neighbours(spec, "raw", 1)
    if name == "knn":
        return Neighbours(spec, space, num_neighbours, temperature)
    if name == "ridge":
        return Ridge(spec, space, kernel_width)
    if name == "pca_gaussian":
        return PcaGaussian(spec, num_components)
    raise ValueError(f"baseline is {name!r}, expected one of {BASELINES}")
