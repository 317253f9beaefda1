"""Statistics of many flat LoRA vectors in one pass, in bounded memory."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from hyperlora_jax.array_types import Float
from hyperlora_jax.lora.sites import LoraSpec


@dataclasses.dataclass(frozen=True)
class FactorSlice:
    """Where one factor matrix lies in the flat vector."""

    path: str
    side: str
    start: int
    stop: int


def factor_slices(spec: LoraSpec) -> list[FactorSlice]:
    """Every factor in vector order: site by site, down then up."""
    slices, start = [], 0
    for site in spec.sites:
        for side, size in (
            ("down", site.rank * site.fan_in),
            ("up", site.rank * site.out_features),
        ):
            slices.append(FactorSlice(site.path, side, start, start + size))
            start += size
    return slices


@dataclasses.dataclass(frozen=True, eq=False)
class VectorWhitening:
    """Element-wise mean [d], and one standard deviation per factor matrix [2 * sites]."""

    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " m"]


def pooled(
    parts: Sequence[VectorWhitening], shares: Sequence[float | int], spec: LoraSpec
) -> VectorWhitening:
    """Statistics of a mixture: means by share, variance within the parts plus that between them."""
    if len(parts) == 1:
        return parts[0]
    share = np.asarray(shares, np.float64) / np.sum(shares)
    mean = np.einsum("k,kd->d", share, [part.mean for part in parts])
    slices = factor_slices(spec)
    starts, sizes = [s.start for s in slices], np.array([s.stop - s.start for s in slices])
    variance = np.zeros(len(slices))
    for weight, part in zip(share, parts, strict=True):
        apart = np.add.reduceat(np.square(part.mean - mean), starts) / sizes
        variance += weight * (np.square(part.std, dtype=np.float64) + apart)
    return VectorWhitening(mean.astype(np.float32), np.sqrt(variance).astype(np.float32))


class RunningWhitening:
    """Accumulates vectors; Chan, Golub and LeVeque's update of mean and squared deviation."""

    def __init__(self, spec: LoraSpec):
        self.slices = factor_slices(spec)
        self.count = 0
        self.mean = np.zeros(spec.num_parameters)
        self.squares = np.zeros(spec.num_parameters)

    def add(self, vectors: Float[np.ndarray, "n d"]) -> None:
        """Adds a batch of vectors."""
        n = len(vectors)
        batch_mean = vectors.mean(axis=0, dtype=np.float64)
        centred = vectors - batch_mean.astype(np.float32)
        squares = np.einsum("nd,nd->d", centred, centred)
        shift = batch_mean - self.mean
        total = self.count + n
        self.squares += squares + shift**2 * (self.count * n / total)
        self.mean += shift * (n / total)
        self.count = total

    def result(self) -> VectorWhitening:
        """The statistics so far; a factor that never varies gets the standard deviation 1."""
        starts = [s.start for s in self.slices]
        sizes = np.array([s.stop - s.start for s in self.slices])
        variance = np.add.reduceat(self.squares, starts) / (max(self.count, 1) * sizes)
        std = np.where(variance > 0, np.sqrt(variance), 1.0)
        return VectorWhitening(self.mean.astype(np.float32), std.astype(np.float32))
