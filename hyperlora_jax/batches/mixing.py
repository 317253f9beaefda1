"""Batches from several datasets at once, each with its own share, resumable like all others."""

from collections.abc import Sequence

import numpy as np

from hyperlora_jax.array_types import Float, Int
from hyperlora_jax.batches import stable_random
from hyperlora_jax.batches.pipelines import Order
from hyperlora_jax.errors import UserError

PATTERN = 1024  # positions after which the pattern of datasets repeats


class MixedSubjects:
    """An endless series of subject numbers, of every group in its share.

    Every `PATTERN` positions hold each group in its share (to 1/1024, at least once), in one
    shuffled pattern; each group is walked through in its own shuffled epochs. Random access is
    O(1).
    """

    def __init__(
        self,
        groups: Sequence[Int[np.ndarray, " n"]],
        weights: Sequence[float | int],
        seed: int,
    ):
        if len(weights) != len(groups):
            raise UserError(f"{len(weights)} weights given for {len(groups)} datasets")
        shares = np.asarray(weights, np.float64)
        if not (np.isfinite(shares).all() and (shares > 0).all()):
            raise UserError(f"dataset weights are {list(weights)}, expected positive numbers")
        self.groups, self.counts = groups, _apportion(shares / shares.sum())
        pattern = np.repeat(np.arange(len(groups)), self.counts)
        self.pattern = pattern[stable_random.permutation(seed, 0, PATTERN)]
        self.rank = np.zeros(PATTERN, np.int64)
        for k in range(len(groups)):
            self.rank[self.pattern == k] = np.arange(self.counts[k])
        self.orders = [Order(len(group), seed + k) for k, group in enumerate(groups)]

    def at(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Subject numbers at some positions of the series."""
        blocks, offsets = np.divmod(positions, PATTERN)
        owners = self.pattern[offsets]
        within = blocks * self.counts[owners] + self.rank[offsets]
        subjects = np.empty(len(positions), np.int64)
        for k in np.unique(owners):
            mine = owners == k
            subjects[mine] = self.groups[k][self.orders[k].at(within[mine])]
        return subjects


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
