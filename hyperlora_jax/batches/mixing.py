"""Batches from several datasets at once, each with its own share, resumable like all others."""

from collections.abc import Sequence

import numpy as np

from hyperlora_jax.array_types import Float, Int
from hyperlora_jax.batches import stable_random
from hyperlora_jax.batches.pipelines import Order
from hyperlora_jax.errors import UserError

PATTERN = 1024  # positions after which the pattern of datasets repeats


class MixedOrder:
    """Which dataset and which of its records is the i-th of an endless series.

    Every `PATTERN` positions hold each dataset in its share (to 1/1024, at least once), in one
    shuffled pattern; each dataset walks through its own shuffled epochs. Random access is O(1).
    """

    def __init__(self, num_records: Sequence[int], weights: Sequence[float | int], seed: int):
        if len(weights) != len(num_records):
            raise UserError(f"{len(weights)} weights given for {len(num_records)} datasets")
        shares = np.asarray(weights, np.float64)
        if not (np.isfinite(shares).all() and (shares > 0).all()):
            raise UserError(f"dataset weights are {list(weights)}, expected positive numbers")
        counts = _apportion(shares / shares.sum())
        pattern = np.repeat(np.arange(len(counts)), counts)
        self.pattern = pattern[stable_random.permutation(seed, 0, PATTERN)]
        self.counts = counts
        self.rank = np.zeros(PATTERN, np.int64)
        for k in range(len(counts)):
            self.rank[self.pattern == k] = np.arange(counts[k])
        self.orders = [Order(n, seed + k) for k, n in enumerate(num_records)]

    def at(
        self, positions: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """(dataset numbers, record numbers in them) at some positions of the series."""
        blocks, offsets = np.divmod(positions, PATTERN)
        datasets = self.pattern[offsets]
        within = blocks * self.counts[datasets] + self.rank[offsets]
        records = np.empty(len(positions), np.int64)
        for k in np.unique(datasets):
            mine = datasets == k
            records[mine] = self.orders[k].at(within[mine])
        return datasets, records


class MixedSubjects:
    """An endless series of subject numbers, of every group in its share."""

    def __init__(
        self,
        groups: Sequence[Int[np.ndarray, " n"]],
        weights: Sequence[float | int],
        seed: int,
    ):
        self.groups = groups
        self.order = MixedOrder([len(group) for group in groups], weights, seed)

    def at(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Subject numbers at some positions of the series."""
        datasets, records = self.order.at(positions)
        pairs = zip(datasets, records, strict=True)
        return np.asarray([self.groups[k][record] for k, record in pairs], np.int64)


def _apportion(shares: Float[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """Whole positions by share (largest remainders), every dataset at least one."""
    exact = shares * PATTERN
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() > PATTERN:
        counts[counts.argmax()] -= 1
    for k in np.argsort(-(exact - np.floor(exact))):
        if counts.sum() == PATTERN:
            break
        counts[k] += 1
    counts[counts.argmax()] += PATTERN - counts.sum()
    return counts
