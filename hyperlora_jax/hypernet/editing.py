"""Moving between LoRAs and along attributes (weights2weights, arXiv 2406.09413, sections 3.2, 3.3).

    interpolate   LoRAs on the way from one subject to another, in the space of conditions: the
                  generator writes the LoRA of a mixed embedding
    Space         principal components of the training LoRAs: coordinates ⇄ vectors
    direction     normal of a linear classifier of an attribute in that space; `edit` walks along it

A direction has unit length in whitened coordinates, so an amount of 1 is one standard deviation of
the training LoRAs along it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hyperlora_jax.array_types import AnyArray, Array, Bool, Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.baselines import principal_components
from hyperlora_jax.hypernet.model import Hypernetwork
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSpec

MARK = "hyperlora.directions"


def interpolate(
    hyper: Hypernetwork,
    key: Array,
    first: Float[AnyArray, "k h w 3"],
    second: Float[AnyArray, "j h w 3"],
    weights: Sequence[float],
) -> Params:
    """One LoRA per weight: 0 is the first subject's, 1 the second's. All from one noise.

    Args:
        first, second: as many reference pictures of one subject as of the other.

    Raises:
        UserError: different numbers of pictures.
    """
    if np.shape(first) != np.shape(second):
        raise UserError(
            f"interpolate: references have the shapes {np.shape(first)} and {np.shape(second)}, "
            "expected the same"
        )
    pooled, tokens = hyper.embed(np.stack([np.asarray(first), np.asarray(second)]))
    loras = []
    for weight in weights:  # one by one: equal noise whatever the other weights are
        mixed = [x[:1] + weight * (x[1:] - x[:1]) for x in (pooled, tokens)]
        loras.append(hyper.write(key, *mixed))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *loras)


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """Principal components of training LoRAs.

    Attributes:
        mean: [d]. components: [k, d], orthonormal. spread: [k], standard deviation along each.
    """

    spec: LoraSpec
    mean: Float[np.ndarray, " d"]
    components: Float[np.ndarray, "k d"]
    spread: Float[np.ndarray, " k"]

    @classmethod
    def fit(cls, vectors: Float[np.ndarray, "t d"], spec: LoraSpec, size: int = 1000) -> "Space":
        """Of some LoRA vectors, in one gauge or from one initialisation."""
        mean = vectors.mean(axis=0)
        return cls(spec, mean, *principal_components(vectors - mean, size))

    def coordinates(self, vectors: Float[AnyArray, "l d"]) -> Float[np.ndarray, "l k"]:
        """Whitened coordinates: unit variance over the training LoRAs."""
        return (np.asarray(vectors) - self.mean) @ self.components.T / self.spread

    def vectors(self, coordinates: Float[AnyArray, "l k"]) -> Float[np.ndarray, "l d"]:
        """LoRA vectors with these coordinates."""
        return self.mean + (np.asarray(coordinates) * self.spread) @ self.components

    def direction(
        self,
        vectors: Float[AnyArray, "t d"],
        shown: Bool[np.ndarray, " t"],
        penalty: float = 1.0,
    ) -> Float[np.ndarray, " d"]:
        """Where an attribute lies: difference in LoRA vectors for one standard deviation of it.

        Args:
            vectors: labelled LoRAs.
            shown: which of them show the attribute.
            penalty: ridge on the classifier's normal, in units of the number of LoRAs.

        Raises:
            UserError: all or none of them show it.
        """
        labels = np.asarray(shown, np.float64)
        if labels.min() == labels.max():
            raise UserError(
                f"attribute direction: {int(labels.sum())} of {len(labels)} LoRAs show it, "
                "expected some that do and some that do not"
            )
        known = self.coordinates(vectors).astype(np.float64)
        known -= known.mean(axis=0)
        signs = (labels - labels.mean()) / labels.std()
        gram = known.T @ known / len(known) + penalty * np.eye(known.shape[1])
        normal = np.linalg.solve(gram, known.T @ signs / len(known))
        normal /= max(float(np.linalg.norm(normal)), 1e-12)
        return ((normal * self.spread) @ self.components).astype(np.float32)


def edit(
    lora: Params,
    spec: LoraSpec,
    directions: Mapping[str, Float[AnyArray, " d"]],
    amounts: Mapping[str, float],
) -> Params:
    """LoRA + Σ amount · direction, on raw factors; works on one LoRA and on a batch.

    Raises:
        UserError: an attribute without a direction.
    """
    for name in amounts:
        if name not in directions:
            raise UserError(
                f"edit: no direction {name!r}, there are {', '.join(sorted(directions)) or 'none'}"
            )
    vector = vectorize.flatten(jax.tree.map(jnp.asarray, lora), spec)
    for name, amount in amounts.items():
        vector = vector + amount * jnp.asarray(directions[name])
    return vectorize.unflatten(vector, spec)


def save_directions(
    path: epath.PathLike, directions: Mapping[str, Float[np.ndarray, " d"]], spec: LoraSpec
) -> None:
    """Writes directions as one .safetensors file that knows its spec."""
    arrays = {name: np.ascontiguousarray(v, np.float32) for name, v in directions.items()}
    epath.Path(path).write_bytes(save(arrays, {MARK: spec.fingerprint}))


def load_directions(path: epath.PathLike, spec: LoraSpec) -> dict[str, Float[np.ndarray, " d"]]:
    """Reads what `save_directions` wrote.

    Raises:
        UserError: no such file, a damaged one, or directions for another spec.
    """
    try:
        arrays = load(epath.Path(path).read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"directions {path}: cannot be read ({error})") from error
    for name, values in arrays.items():
        if values.shape != (spec.num_parameters,):
            raise UserError(
                f"directions {path}: {name} has {values.size} numbers, the LoRA's spec "
                f"{spec.fingerprint[:12]} has {spec.num_parameters}"
            )
    return arrays
