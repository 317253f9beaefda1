"""One subject of a dataset: its pictures, its condition, and the LoRA fitted to it if any."""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from hyperlora_jax.array_types import Float

SPLITS = ("train", "validation", "test")


def _no_losses() -> np.ndarray:
    return np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """Everything known about one concept.

    Attributes:
        id: unique name in its dataset. Several subjects may show one identity.
        identity: who or what is shown; splits never divide an identity.
        references: PNG bytes of the pictures that a hypernetwork is given.
        targets: PNG bytes of the pictures that a LoRA shall reproduce.
        captions: one prompt per target.
        lora: folded raw factors as a flat vector in spec order, or None.
        embeddings: by encoder name, one row per reference.
        seed: of the fit. num_steps: of the fit. loss_curve: of the fit, evenly spaced.
        split: "train", "validation", "test", or "" to let the dataset choose by identity.
    """

    id: str
    identity: str
    references: tuple[bytes, ...] = ()
    targets: tuple[bytes, ...] = ()
    captions: tuple[str, ...] = ()
    lora: Float[np.ndarray, " d"] | None = None
    embeddings: Mapping[str, Float[np.ndarray, "n e"]] = dataclasses.field(default_factory=dict)
    seed: int = 0
    num_steps: int = 0
    loss_curve: Float[np.ndarray, " t"] = dataclasses.field(default_factory=_no_losses)
    split: str = ""

    def __post_init__(self):
        if len(self.targets) != len(self.captions):
            raise ValueError(
                f"subject {self.id}: {len(self.targets)} targets and {len(self.captions)} captions"
            )
        if self.split not in ("", *SPLITS):
            raise ValueError(f"subject {self.id}: split {self.split!r}, expected one of {SPLITS}")
        for encoder, rows in self.embeddings.items():
            if len(rows) != len(self.references):
                raise ValueError(
                    f"subject {self.id}: {len(rows)} {encoder} embeddings for "
                    f"{len(self.references)} references"
                )


def split_by_hash(
    identity: str, split_seed: int = 0, validation: float = 0.05, test: float = 0.05
) -> str:
    """The split of an identity: fixed by its name and the seed, with the given shares."""
    digest = hashlib.sha256(f"{split_seed}/{identity}".encode()).digest()
    u = int.from_bytes(digest[:6], "big") / 2**48
    if u < validation:
        return "validation"
    return "test" if u < validation + test else "train"
