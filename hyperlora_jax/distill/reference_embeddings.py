"""Embeddings of a finished concept's references, by the name of the condition encoder."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from hyperlora_jax.array_types import Float
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures
from hyperlora_jax.subjects.encoded_subjects import encode_in_batches

AT_ONCE = 16  # pictures in a batch; the last one is filled up, so that one program serves all


class ReferenceEmbeddings:
    """Pooled embeddings of PNG files by several encoders, each picture as a centre square.

    Args:
        encoders: what `load_condition_encoder` takes.
        size: pixels per side that the encoders are given.

    Raises UserError for an encoder that cannot be read and for two of one name.
    """

    def __init__(self, encoders: Sequence[str], size: int):
        loaded = [load_condition_encoder(source) for source in encoders]
        self.encoders = {encoder.name.replace("/", "_"): encoder for encoder in loaded}
        self.size = size
        if len(self.encoders) != len(loaded):
            names = ", ".join(encoder.name for encoder in loaded)
            raise UserError(f"distill.encoders: got {names}, expected different names")

    def hashes(self) -> dict[str, str]:
        """Hash of the weights by name, for the dataset's card."""
        return {name: encoder.hash for name, encoder in self.encoders.items()}

    def of(self, references: Sequence[bytes]) -> dict[str, Float[np.ndarray, "n e"]]:
        """One row per reference, by encoder."""
        if not self.encoders:
            return {}
        images = np.stack([pictures.decode(png, self.size) for png in references])
        images = images.astype(np.float32) / 255.0
        embeddings = {}
        for name, on_host in self.encoders.items():
            # Whose parameters leave the devices with it.
            encoder = dataclasses.replace(on_host)  # pyright: ignore[reportArgumentType]
            embeddings[name] = encode_in_batches(
                lambda batch, encoder=encoder: np.asarray(encoder.encode(batch)[0], np.float32),
                images,
                AT_ONCE,
                whole=True,
            )
        return embeddings
