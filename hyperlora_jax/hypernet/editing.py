"""Moving between LoRAs and along attributes.

    interpolate     LoRAs on the way from one subject to another, in the space of conditions: the
                    generator writes the LoRA of a mixed embedding
    fit_directions  what an attribute adds to a LoRA, from LoRAs of which it is known
    edit            LoRA + amount · direction

weights2weights (arXiv 2406.09413, section 3.3) takes the normal of a linear classifier of the raw
factors. Factors mean something only beside their partner: a hypernetwork that was trained on
pictures writes others than the fits that the classifier knows, and in them such a normal shows
little. Directions here are deltas: least squares of Δ_i on the labels of subject i, all attributes
at once, so that what comes with another attribute is not counted twice; each is cut back to the
spec's rank.

An amount of 1 is the difference between subjects that show an attribute and subjects that do not,
for a LoRA as large (norm of its delta) as the labelled ones are on average.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import AnyArray, Array, Bool, Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.baselines import blend_site
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import factors, losses, vectorize
from hyperlora_jax.lora.sites import LoraSpec, site_factors, tree_from_sites
from hyperlora_jax.lora_files import safetensors_io

MARK, SIZE = "hyperlora.directions", "hyperlora.delta_norm"


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
class Directions:
    """What attributes add to a LoRA.

    Attributes:
        spec: sites and ranks of every direction.
        vectors: {attribute: flat LoRA [d] whose delta is added at an amount of 1}.
        size: mean norm of the labelled LoRAs' deltas.
    """

    spec: LoraSpec
    vectors: Mapping[str, Float[np.ndarray, " d"]]
    size: float


def fit_directions(
    vectors: Float[np.ndarray, "t d"], spec: LoraSpec, labels: Mapping[str, Bool[np.ndarray, " t"]]
) -> Directions:
    """Directions of attributes.

    Args:
        vectors: LoRAs whose attributes are known, in any gauge.
        labels: which of them show an attribute, by its name.

    Raises:
        UserError: an attribute that all or none show, or one that is told by the others; LoRAs
            whose deltas are all zero.
    """
    for name, shown in labels.items():
        if np.all(shown) or not np.any(shown):
            raise UserError(
                f"attribute {name}: {int(np.sum(shown))} of {len(shown)} LoRAs show it, expected "
                "some that do and some that do not"
            )
    table = np.stack([np.ones(len(vectors)), *(np.asarray(v, float) for v in labels.values())], 1)
    if np.linalg.matrix_rank(table) < table.shape[1]:
        raise UserError(
            f"attributes {', '.join(labels)}: one follows from the others, so that their "
            "directions cannot be told apart; leave it out"
        )
    weights = np.linalg.pinv(table)[1:].astype(np.float32)
    blended, squares, start = {}, np.zeros(len(vectors)), 0
    for site in spec.sites:  # one at a time: deltas of all sites are as large as the base
        alone = LoraSpec((site,))
        own = vectors[:, start : start + site.num_parameters]
        pairs = site_factors(vectorize.unflatten(own, alone), site)
        blended[site.path] = blend_site(weights, pairs, site.rank)
        squares += np.asarray(losses.delta_inner(pairs, pairs))
        start += site.num_parameters
    flat = np.asarray(vectorize.flatten(tree_from_sites(blended), spec))
    size = float(np.sqrt(squares).mean())
    if not size:
        raise UserError(f"directions: the deltas of all {len(vectors)} LoRAs are zero")
    return Directions(spec, dict(zip(labels, flat, strict=True)), size)


def edit(
    lora: Params,
    directions: Directions,
    amounts: Mapping[str, float | Float[AnyArray, " l"]],
) -> tuple[Params, LoraSpec]:
    """LoRA + Σ amount · direction, exactly: ranks add. Works on one LoRA and on a batch, of which
    each LoRA may have an amount of its own.

    Returns:
        the LoRA and its spec.

    Raises:
        UserError: an attribute without a direction.
    """
    spec = directions.spec
    share = jnp.sqrt(losses.delta_inner(lora, lora)) / directions.size
    for name, amount in amounts.items():
        if name not in directions.vectors:
            names = ", ".join(sorted(directions.vectors)) or "none"
            raise UserError(f"edit: no direction {name!r}, there are {names}")
        added = vectorize.unflatten(jnp.asarray(directions.vectors[name]), spec)
        count = factors.num_loras(lora)
        added = added if count is None else factors.repeat(added, count)
        lora = factors.concatenate_ranks(lora, factors.scale(added, amount * share))
    ranks = 1 + len(amounts)
    grown = [dataclasses.replace(site, rank=ranks * site.rank) for site in spec.sites]
    return lora, LoraSpec(tuple(grown))


def save_directions(path: epath.PathLike, directions: Directions) -> None:
    """Writes directions as one .safetensors file that knows its spec."""
    arrays = {n: np.ascontiguousarray(v, np.float32) for n, v in directions.vectors.items()}
    facts = {MARK: directions.spec.to_json(), SIZE: repr(directions.size)}
    try:
        storage.replaced(path, safetensors_io.encode(arrays, facts))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({storage.reason(error)})") from error


def load_directions(path: epath.PathLike, spec: LoraSpec) -> Directions:
    """Reads what `save_directions` wrote.

    Raises:
        UserError: no such file, a damaged one, or directions for another spec.
    """
    vectors, facts = safetensors_io.read(storage.fetched(path))
    if MARK not in facts or SIZE not in facts:
        raise UserError(f"directions {path}: is no file of `hyperlora directions`")
    own = LoraSpec.from_json(facts[MARK])
    if own.fingerprint != spec.fingerprint:
        raise UserError(
            f"directions {path}: made for the LoRA spec {own.fingerprint[:12]} ({len(own)} sites, "
            f"rank {own.max_rank}), the checkpoint's is {spec.fingerprint[:12]} ({len(spec)} "
            f"sites, rank {spec.max_rank})"
        )
    return Directions(own, vectors, float(facts[SIZE]))
