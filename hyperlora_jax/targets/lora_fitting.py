"""Brings one LoRA of any rank to a spec: a flat vector, and what was lost on the way.

    rank above the spec's    best approximation of the delta at the spec's rank (QR of both factors
                             and the SVD of the small core), the lost share of ‖delta‖² reported
    rank below the spec's    zero-padded, nothing lost
    site missing in the LoRA an error, or a zero delta by option
    site not in the spec     an error, or dropped by option, its energy reported as lost
In numpy, site by site: files come one at a time and every one may have other shapes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from hyperlora_jax.array_types import Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors

OnMissing = Literal["error", "zero"]
OnExtra = Literal["error", "drop"]


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A LoRA in the layout of a spec.

    Attributes:
        vector: float32, in spec order.
        lost: share of the squared norm of all deltas that did not fit, 0 to 1.
        num_truncated, num_padded, num_missing, num_dropped: sites.
    """

    vector: Float[np.ndarray, " d"]
    lost: float
    num_truncated: int
    num_padded: int
    num_missing: int
    num_dropped: int


def fit_to_spec(
    lora: Params,
    own_spec: LoraSpec,
    spec: LoraSpec,
    on_missing: OnMissing = "error",
    on_extra: OnExtra = "error",
) -> Fitted:
    """The LoRA (numpy leaves) with sites `own_spec` as a vector of `spec`.

    Raises UserError without a file name, both sides named, when it belongs to other layers.
    """
    theirs = own_spec.by_path
    missing = [site.path for site in spec.sites if site.path not in theirs]
    extra = [path for path in theirs if path not in spec.by_path]
    _check_sites(spec, own_spec, missing, extra, on_missing, on_extra)
    pieces: list[np.ndarray] = []
    total = lost = 0.0
    truncated = padded = 0
    for site in spec.sites:
        if site.path not in theirs:
            pieces.append(np.zeros(site.num_parameters, np.float32))
            continue
        other = theirs[site.path]
        _check_sizes(site, other)
        pair = site_factors(lora, other)
        down = np.asarray(pair["down"], np.float32).reshape(site.fan_in, other.rank)
        up = np.asarray(pair["up"], np.float32)
        down, up, energies = fit_rank(down, up, site.rank)
        total += energies[0]
        lost += energies[1]
        truncated += other.rank > site.rank and energies[1] > 0
        padded += other.rank < site.rank
        pieces += flat_factors(down, up, site)
    for path in extra:
        pair = site_factors(lora, theirs[path])
        down = np.asarray(pair["down"], np.float32).reshape(-1, theirs[path].rank)
        energy = squared_norm(down, np.asarray(pair["up"], np.float32))
        total += energy
        lost += energy
    share = lost / total if total > 0 else 0.0
    vector = np.concatenate(pieces)
    return Fitted(vector, share, int(truncated), int(padded), len(missing), len(extra))


def fit_rank(
    down: Float[np.ndarray, "m r"], up: Float[np.ndarray, "r o"], rank: int
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """(down [m, rank], up [rank, o], (squared norm of the delta, squared norm that was cut))."""
    energy = squared_norm(down, up)
    more = rank - down.shape[1]
    if more >= 0:
        return np.pad(down, ((0, 0), (0, more))), np.pad(up, ((0, more), (0, 0))), (energy, 0.0)
    used = np.flatnonzero(down.any(axis=0) & up.any(axis=1))
    if len(used) <= rank:  # zero components of a padded file: the factors stay as they are
        return *fit_rank(down[:, used], up[used], rank)[:2], (energy, 0.0)
    basis_down, tri_down = np.linalg.qr(down)
    basis_up, tri_up = np.linalg.qr(up.T)
    left, sigma, right = np.linalg.svd(tri_down @ tri_up.T)
    root = np.sqrt(sigma[:rank])
    new_down = (basis_down @ left[:, :rank]) * root
    new_up = root[:, None] * (right[:rank] @ basis_up.T)
    return new_down, new_up, (energy, float(np.square(sigma[rank:]).sum()))


def squared_norm(down: Float[np.ndarray, "m r"], up: Float[np.ndarray, "r o"]) -> float:
    """‖down·up‖²_F by r×r Gram matrices."""
    return float(((down.T @ down) * (up @ up.T)).sum())


def flat_factors(down: np.ndarray, up: np.ndarray, site: LoraSite) -> list[np.ndarray]:
    """Both factors in vector order: (r, in, kh, kw) and (out, r), row by row."""
    if site.kind == "conv":
        down = down.reshape(*site.kernel_size, site.in_features, site.rank).transpose(3, 2, 0, 1)
    else:
        down = down.T
    return [np.ascontiguousarray(down, np.float32).ravel(), np.ascontiguousarray(up.T).ravel()]


def _check_sites(
    spec: LoraSpec,
    own_spec: LoraSpec,
    missing: list[str],
    extra: list[str],
    on_missing: OnMissing,
    on_extra: OnExtra,
) -> None:
    if len(missing) == len(spec):
        raise UserError(
            f"LoRA of other layers: it has none of the {len(spec)} sites, "
            f"its first is {own_spec.sites[0].path}"
        )
    if missing and on_missing == "error":
        raise UserError(
            f"LoRA lacks {len(missing)} of {len(spec)} sites, first {missing[0]} "
            "(missing ones can be taken as zero)"
        )
    if extra and on_extra == "error":
        raise UserError(
            f"LoRA has {len(extra)} sites beyond the {len(spec)} expected ones, first {extra[0]} "
            "(further ones can be dropped)"
        )


def _check_sizes(site: LoraSite, other: LoraSite) -> None:
    ours = (site.in_features, site.out_features, *site.kernel_size)
    theirs = (other.in_features, other.out_features, *other.kernel_size)
    if ours != theirs:
        raise UserError(
            f"LoRA of another base: layer {site.path} is {_size(theirs)} in the file, "
            f"{_size(ours)} in the base"
        )


def _size(sizes: tuple[int, ...]) -> str:
    window = "" if sizes[2:] == (1, 1) else f" {sizes[2]}×{sizes[3]}"
    return f"{sizes[0]}→{sizes[1]}{window}"


def describe_losses(fitted: Mapping[str, float]) -> str:
    """One line about the lost shares of many LoRAs, by id."""
    shares = np.array(list(fitted.values()))
    if not len(shares) or not shares.any():
        return "no energy lost to ranks or layers"
    worst = max(fitted, key=lambda name: fitted[name])
    return (
        f"{int((shares > 0).sum())} of {len(shares)} LoRAs lost energy: median "
        f"{np.median(shares):.2%}, worst {shares.max():.2%} ({worst})"
    )
