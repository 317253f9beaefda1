"""Random numbers that are a hash of what they are for: equal on every machine and NumPy version."""

import numpy as np

from hyperlora_jax.array_types import Float, Int


def uniforms(seed: int, numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """One value in (0, 1] for each number, by splitmix64 of seed and number."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * (numbers.astype(np.uint64) + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 1.0) / 2.0**53


def permutation(seed: int, epoch: int, count: int) -> Int[np.ndarray, " n"]:
    """The numbers below `count` in an order fixed by seed and epoch."""
    drawn = uniforms(seed & (2**64 - 1), np.array([epoch]))
    key = int(drawn[0] * 2**53) << 10
    return np.argsort(uniforms(key, np.arange(count)), kind="stable")
