"""Samplers of `diffusion/processes.py` as tables: what a step multiplies x, the prediction and
fresh noise by. Every sampler there is linear in them:

    x ← kept · x + moved · prediction(x, time) + fresh · noise
"""

import numpy as np

from hyperlora_jax.array_types import Float
from hyperlora_jax.diffusion import samplers
from hyperlora_jax.diffusion.processes import SAMPLERS, Process, RectifiedFlow, VariancePreserving

MAX_STEPS = 100  # or what the checkpoint takes, where that is more


def most_steps(process: Process, own: int) -> int:
    """Largest number of steps that has a table."""
    most = max(MAX_STEPS, own)
    return most if isinstance(process, RectifiedFlow) else min(most, process.num_train_timesteps)


def tables(process: Process, own: int) -> dict[str, Float[np.ndarray, "s 4"]]:
    """{sampler: rows of (time, kept, moved, fresh)} for 1, 2, … steps, one after another."""
    counts = range(1, most_steps(process, own) + 1)
    return {
        sampler: np.concatenate([_table(process, n, sampler == "ancestral") for n in counts])
        for sampler in SAMPLERS
    }


def _table(process: Process, count: int, ancestral: bool) -> Float[np.ndarray, "s 4"]:
    if isinstance(process, RectifiedFlow):
        columns = _flow(count, ancestral)
    else:
        assert isinstance(process, VariancePreserving)
        columns = _variance_preserving(process, count, ancestral)
    return np.stack(columns, axis=1).astype(np.float32)


def _flow(count: int, ancestral: bool) -> tuple[np.ndarray, ...]:
    """With x0 = x - time · v and noise = x0 + v."""
    grid = np.linspace(1.0, 0.0, count + 1)
    now, after = grid[:-1], grid[1:]
    if not ancestral:
        return now, np.ones(count), after - now, np.zeros(count)
    ratio = (1 - now) / np.maximum(1 - after, 1e-6)
    variance = np.maximum(now**2 - (ratio * after) ** 2, 0.0) * (after / now) ** 2
    direct = np.sqrt(np.maximum(after**2 - variance, 0.0))
    share = 1 - after + direct
    return now, share, direct - now * share, np.sqrt(variance)


def _variance_preserving(
    process: VariancePreserving, count: int, ancestral: bool
) -> tuple[np.ndarray, ...]:
    """Equation (4) of `samplers.py`, with x0 and noise written in x and the prediction."""
    timesteps = samplers.timesteps_of(process.schedule, count)
    now = process.schedule.alphas_cumprod.astype(np.float64)[timesteps]
    after = np.append(now[1:], 1.0)
    variance = np.maximum((1 - after) / (1 - now) * (1 - now / after), 0.0) * ancestral
    direct, target = np.sqrt(np.maximum(1 - after - variance, 0.0)), np.sqrt(after)
    signal, noise = np.sqrt(now), np.sqrt(1 - now)
    if process.prediction == "v":
        kept, moved = target * signal + direct * noise, direct * signal - target * noise
    else:
        kept, moved = direct / noise, target - direct * signal / noise
    return (timesteps + 1) / process.num_train_timesteps, kept, moved, np.sqrt(variance)
