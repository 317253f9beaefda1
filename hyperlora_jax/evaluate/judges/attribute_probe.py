"""Reads the exported attribute probe and asks it what pictures show."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from hyperlora_jax.array_types import AnyArray, Float, Int, Json, Params
from hyperlora_jax.encoders.condition_encoders import check_params, load_weights
from hyperlora_jax.encoders.image_encoder import ConvEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.pretrain.probe_task import FORMAT, ProbeNetwork
from hyperlora_jax.subjects.encoded_subjects import encode_in_batches

BATCH = 256  # pictures at a time


@dataclasses.dataclass(frozen=True, eq=False)
class AttributeProbe:
    """Names the class of every caption part that a picture shows.

    Attributes:
      name: for messages and metadata.
      module, params: the network.
      parts: {caption part: class names}.
      hash: hex sha256 of the weights.
      facts: what is known of its training.
    """

    name: str
    module: ProbeNetwork
    params: Params
    parts: Mapping[str, tuple[str, ...]]
    hash: str
    facts: Json

    @classmethod
    def load(cls, path: epath.PathLike | None = None) -> "AttributeProbe":
        """Reads what `export_probe` wrote; without a path, the probe shipped for avatars.

        Raises:
          UserError: no such folder, another kind of folder, or weights that do not fit.
        """
        path = path or epath.resource_path("hyperlora_jax") / "assets" / "avatar-probe"
        config, params, weights_hash = load_weights(path, FORMAT)
        try:
            kwargs = {**config["module"], "widths": tuple(config["module"]["widths"])}
            parts = {part: tuple(classes) for part, classes in config["parts"]}
            module = ProbeNetwork(ConvEncoder(**kwargs), tuple(len(c) for c in parts.values()))
            name, facts = config["name"], config["facts"]
            check_params(path, module, params)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"probe {path}: config.json does not describe one ({error})") from error
        return cls(name, module, params, parts, weights_hash, facts)

    def classes(self, images: Float[AnyArray, "*batch h w 3"]) -> Int[np.ndarray, "*batch q"]:
        """Class index per caption part, in the order of `parts`; pixels are clipped to [0, 1]."""
        pictures = np.asarray(images, np.float32)
        flat = np.nan_to_num(pictures.reshape(-1, *pictures.shape[-3:]))
        flat = np.clip(flat, 0.0, 1.0)
        classes_of = functools.partial(_classes, self.module, self.params)
        every = encode_in_batches(classes_of, flat, BATCH, whole=True)
        return every.reshape(*pictures.shape[:-3], len(self.parts))

    def check_parts(self, parts: Json) -> None:
        """Raises UserError unless the probe judges exactly these caption parts and classes."""
        wanted = {part: tuple(classes) for part, classes in parts.items()}
        if dict(self.parts) != wanted:
            raise UserError(
                f"probe {self.name}: judges {list(self.parts)}, expected {list(wanted)} "
                "with the same classes; train one for this style"
            )


@functools.partial(jax.jit, static_argnames="module")
def _classes(module: ProbeNetwork, params: Params, images: jax.Array) -> jax.Array:
    logits = cast(Sequence[jax.Array], module.apply({"params": params}, images))
    return jnp.stack([part.argmax(axis=-1) for part in logits], axis=-1)
