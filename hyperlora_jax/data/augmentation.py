"""More from few examples: convex mixtures and noise of LoRA vectors, changes of pictures.

All of it is a pure function of (seed, step, record), so a resumed run sees the same.
"""

import dataclasses
from collections.abc import Mapping

import grain.python as grain
import numpy as np

from hyperlora_jax.array_types import Float, UInt8
from hyperlora_jax.data.pipelines import Batch, Order, common_length, shard_slice, step_batches
from hyperlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class VectorAugmentation:
    """Some examples of a batch become convex mixtures of examples; noise is added to all.

    Attributes:
        mixed: names of the arrays that are mixed with common weights (LoRA and condition).
        probability: of an example being a mixture.
        num_mixed: how many examples make a mixture, the example itself among them.
        concentration: of the Dirichlet distribution of the weights; 1 is uniform.
        noise: standard deviation of Gaussian noise by array name, in units of `scale`.
        scale: by array name, a number or one per element (the whitening's); 1 if not given.
    """

    mixed: tuple[str, ...] = ()
    probability: float = 0.5
    num_mixed: int = 2
    concentration: float = 1.0
    noise: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scale: Mapping[str, np.ndarray | float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise UserError(f"mixture probability is {self.probability}, expected 0 to 1")
        if self.num_mixed < 2 or self.concentration <= 0:
            raise UserError(
                f"mixtures of {self.num_mixed} with concentration {self.concentration}, "
                "expected at least 2 and a positive number"
            )

    def weights(self, generator: np.random.Generator) -> Float[np.ndarray, " k"]:
        """Weights of the example itself (first) and of the others; sum 1."""
        mixes = generator.random() < self.probability
        drawn = generator.dirichlet(np.full(self.num_mixed, self.concentration))
        alone = np.zeros(self.num_mixed)
        alone[0] = 1.0
        return drawn if mixes else alone


def augmented_batches(
    arrays: Mapping[str, np.ndarray],
    augmentation: VectorAugmentation,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    num_shards: int = 1,
) -> grain.DatasetIterator:
    """Like `array_batches`, with augmented examples; "mixture_weight" [b] is the example's own.

    Arrays that are not mixed (identity numbers, ...) are those of the example itself.
    """
    unknown = {*augmentation.mixed, *augmentation.noise} - set(arrays)
    if unknown:
        raise UserError(f"augmentation of {sorted(unknown)}, the arrays are {sorted(arrays)}")
    num_records = common_length(arrays)
    order = Order(num_records, seed)
    first, count = shard_slice(batch_size, shard_index, num_shards)

    def make_batch(step: int) -> Batch:
        start = step * batch_size + first
        records = order.records(start, start + count)
        generators = [np.random.default_rng((seed, 1, step, int(r))) for r in records]
        weights = np.stack([augmentation.weights(g) for g in generators])
        others = np.stack([g.integers(num_records, size=weights.shape[1]) for g in generators])
        others[:, 0] = records
        batch: Batch = {}
        for name, array in arrays.items():
            if name in augmentation.mixed:
                rows = np.asarray(array[others], np.float32)
                batch[name] = np.einsum("bk,bk...->b...", weights.astype(np.float32), rows)
            else:
                batch[name] = np.asarray(array[records])
            if level := augmentation.noise.get(name):
                rows = np.asarray(batch[name], np.float32)
                noise = [g.standard_normal(rows.shape[1:], np.float32) for g in generators]
                spread = np.float32(level) * np.asarray(augmentation.scale.get(name, 1), np.float32)
                batch[name] = rows + np.stack(noise) * spread
        return {**batch, "mixture_weight": weights[:, 0].astype(np.float32), "record_id": records}

    return step_batches(make_batch)


@dataclasses.dataclass(frozen=True)
class PictureAugmentation:
    """Changes of a reference picture that keep who is shown.

    Attributes:
        flip: probability of mirroring left and right.
        shift: largest move in pixels, both ways; edges are repeated.
        brightness, contrast: largest relative change.
        noise: standard deviation in grey levels of 255.
    """

    flip: float = 0.5
    shift: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0

    def apply(
        self, picture: UInt8[np.ndarray, "h w 3"], generator: np.random.Generator
    ) -> UInt8[np.ndarray, "h w 3"]:
        """A changed copy."""
        flip, brightness, contrast = generator.random(3)
        moves = generator.integers(-self.shift, self.shift + 1, size=2)
        if flip < self.flip:
            picture = picture[:, ::-1]
        if moves.any():
            height, width = picture.shape[:2]
            rows = np.clip(np.arange(height) + moves[0], 0, height - 1)
            columns = np.clip(np.arange(width) + moves[1], 0, width - 1)
            picture = picture[rows[:, None], columns]
        if not (self.brightness or self.contrast or self.noise):
            return picture.copy()
        values = picture.astype(np.float32)
        mean = values.mean()
        values = (values - mean) * (1 + self.contrast * (2 * contrast - 1)) + mean
        values *= 1 + self.brightness * (2 * brightness - 1)
        if self.noise:
            values += self.noise * generator.standard_normal(values.shape, np.float32)
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)

    def apply_all(
        self, pictures: UInt8[np.ndarray, "n h w 3"], seed: int, step: int
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Every picture changed on its own."""
        out = [
            self.apply(p, np.random.default_rng((seed, 2, step, k))) for k, p in enumerate(pictures)
        ]
        return np.stack(out)
