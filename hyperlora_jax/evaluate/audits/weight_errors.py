"""How far generated LoRAs are from fitted ones in weight space, overall and per site.

Deltas are compared (they do not depend on the gauge). None of this selects models: LoRAs with a
negative share of explained variance can draw the right person, see `compare`.
"""

import dataclasses

import jax
import numpy as np

from hyperlora_jax.array_types import AnyArray, Float, Params
from hyperlora_jax.evaluate.metrics import clustered_mean
from hyperlora_jax.lora import losses
from hyperlora_jax.lora.factors import is_site


@dataclasses.dataclass(frozen=True, eq=False)
class WeightErrors:
    """Errors of l predicted LoRAs against l targets.

    Attributes:
      relative_error: [l] ‖D - D'‖ / ‖D'‖ over all sites; 1 is what no LoRA at all gets.
      cosine: [l] between the deltas of all sites together.
      scale: [l] the factor on the prediction that fits the target best, <D, D'> / <D, D>.
      site_error, site_cosine: {site path: [l]}.
    """

    relative_error: Float[np.ndarray, " l"]
    cosine: Float[np.ndarray, " l"]
    scale: Float[np.ndarray, " l"]
    site_error: dict[str, Float[np.ndarray, " l"]]
    site_cosine: dict[str, Float[np.ndarray, " l"]]

    def to_json(self) -> dict[str, object]:
        """Means with standard errors; per site the means alone."""
        return {
            "relative_error": clustered_mean(self.relative_error).to_json(),
            "cosine": clustered_mean(self.cosine).to_json(),
            "scale": clustered_mean(self.scale).to_json(),
            "site_error": {path: float(v.mean()) for path, v in self.site_error.items()},
            "site_cosine": {path: float(v.mean()) for path, v in self.site_cosine.items()},
        }


def weight_errors(predicted: Params, target: Params) -> WeightErrors:
    """Compares two batches of LoRAs of the same identities.

    Args:
      predicted: LoRA tree with leading axis l.
      target: the same sites and l; ranks may differ.

    Raises:
      ValueError: batches of different length.
    """
    count, wanted = (jax.tree.leaves(tree)[0].shape[0] for tree in (predicted, target))
    if count != wanted:
        raise ValueError(f"not the same identities. Got: {count=} and {wanted=}")
    ours, theirs = sites(predicted), sites(target)
    own = _array(losses.delta_inner(predicted, predicted))
    across = _array(losses.delta_inner(predicted, target))
    return WeightErrors(
        relative_error=_array(losses.relative_delta_error(predicted, target)),
        cosine=_array(losses.delta_cosine(predicted, target)),
        scale=across / np.maximum(own, np.finfo(np.float32).tiny),
        site_error={
            path: _array(losses.relative_delta_error({path: ours[path]}, {path: theirs[path]}))
            for path in ours
        },
        site_cosine={
            path: _array(losses.delta_cosine({path: ours[path]}, {path: theirs[path]}))
            for path in ours
        },
    )


def spectrum(lora: Params) -> dict[str, Float[np.ndarray, "l r"]]:
    """Singular values of every site's delta, largest first, by QR of both factors."""
    return {
        path: np.asarray(_singular_values(pair["down"], pair["up"]), np.float64)
        for path, pair in sites(lora).items()
    }


def sites(lora: Params) -> dict[str, Params]:
    """{path with "/": {"down", "up"}} of a LoRA tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(lora, is_leaf=is_site)
    return {"/".join(str(key.key) for key in path): pair for path, pair in flat}


def _singular_values(down: AnyArray, up: AnyArray) -> np.ndarray:
    down = np.asarray(down, np.float64).reshape(len(down), -1, down.shape[-1])
    right = np.swapaxes(np.asarray(up, np.float64), 1, 2)
    triangle, other = np.linalg.qr(down, mode="r"), np.linalg.qr(right, mode="r")
    return np.linalg.svd(triangle @ np.swapaxes(other, 1, 2), compute_uv=False)


def _array(values: object) -> np.ndarray:
    return np.asarray(values, np.float64)
