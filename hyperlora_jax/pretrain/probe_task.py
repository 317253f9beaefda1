"""The attribute probe: does a picture show what its caption says?

The convolutional encoder with one linear head per caption part, trained by cross-entropy on
renders. Generated pictures are a little soft and noisy where renders are crisp, so training blurs
and blends, adds noise and shifts colours slightly (`augment`): the probe shall judge content.
"""

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from hyperlora_jax.array_types import AnyArray, Array, Float, Int, Json, Params, PRNGKey
from hyperlora_jax.encoders.condition_encoders import arguments_of, save_weights
from hyperlora_jax.encoders.image_encoder import ConvEncoder
from hyperlora_jax.pretrain.encoder_task import make_encoder, part_losses, task_on
from hyperlora_jax.pretrain.render_bundle import RenderBundle, view_batches
from hyperlora_jax.train.loop import Task

FORMAT = "hyperlora-attribute-probe"


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How strongly training pictures are disturbed; every strength is drawn per picture.

    Attributes:
      noise: largest standard deviation of pixel noise.
      blur: largest share of the 3x3-blurred picture in the blend.
      colour: largest shift of each colour channel, and half the largest change of contrast.
    """

    noise: float = 0.08
    blur: float = 1.0
    colour: float = 0.06


class ProbeNetwork(nn.Module):
    """Encoder and one linear head per caption part.

    Attributes:
      encoder: the convolutional encoder.
      part_sizes: number of classes of every caption part.
    """

    encoder: ConvEncoder
    part_sizes: tuple[int, ...]

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the encoder works on."""
        return self.encoder.image_size

    @nn.compact
    def __call__(self, images: Float[AnyArray, "b h w 3"]) -> list[Float[Array, "b classes"]]:
        """Logits per caption part for pictures in [0, 1]."""
        pooled, _ = self.encoder(images)
        return [nn.Dense(n, name=f"part_{i}")(pooled) for i, n in enumerate(self.part_sizes)]


def augment(
    images: Float[AnyArray, "b h w 3"], key: PRNGKey, strength: Augmentation
) -> Float[Array, "b h w 3"]:
    """Blends with a blurred copy, changes contrast and colours, adds noise; in that order."""
    images = jnp.asarray(images)
    blur_key, contrast_key, shift_key, level_key, noise_key = jax.random.split(key, 5)
    one = (images.shape[0], 1, 1, 1)
    share = strength.blur * jax.random.uniform(blur_key, one)
    images = (1.0 - share) * images + share * _blur(images)
    contrast = 1.0 + 2.0 * strength.colour * jax.random.uniform(contrast_key, one, minval=-1.0)
    shift = strength.colour * jax.random.uniform(shift_key, (len(images), 1, 1, 3), minval=-1.0)
    images = 0.5 + contrast * (images - 0.5) + shift
    level = strength.noise * jax.random.uniform(level_key, one)
    return images + level * jax.random.normal(noise_key, images.shape)


def _blur(images: Array) -> Array:
    """Binomial 3x3 blur (1 2 1) / 4 along both axes, edges repeated."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2.0 * padded[:, 1:-1] + padded[:, 2:]) / 4.0
    return (rows[:, :, :-2] + 2.0 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4.0


def probe_loss(
    params: Params,
    frozen: Params,
    batch: Params,
    key: PRNGKey,
    *,
    module: ProbeNetwork,
    strength: Augmentation,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Cross-entropy, mean over caption parts.

    Args:
      batch: images [b, h, w, 3] uint8, labels [b, q].
      key: for the augmentation.

    Returns:
      losses [b]; metrics accuracy (mean over parts) and all_parts (1 where all are right), [b].
    """
    del frozen
    images = augment(batch["images"].astype(jnp.float32) / 255.0, key, strength)
    entropy, right = part_losses(module.apply({"params": params}, images), batch["labels"])
    return entropy.mean(axis=1), {"accuracy": right.mean(axis=1), "all_parts": right.min(axis=1)}


def make_network(bundle: RenderBundle, encoder: Json | None = None) -> ProbeNetwork:
    """The probe for the bundle's caption parts; `encoder`: keyword arguments of `ConvEncoder`."""
    sizes = tuple(len(classes) for classes in bundle.view_parts.values())
    return ProbeNetwork(make_encoder(bundle, encoder), sizes)


def make_task(
    bundle: RenderBundle,
    *,
    batch_size: int = 256,
    seed: int = 0,
    encoder: Json | None = None,
    augmentation: Mapping[str, float] | None = None,
    rows: Int[np.ndarray, " b"] | None = None,
) -> Task:
    """The probe's training as a `Task` for `train.loop.fit`.

    Args:
      bundle: training identities.
      batch_size: pictures per step.
      seed: of the batches.
      encoder: keyword arguments of `ConvEncoder`; image_size defaults to the bundle's.
      augmentation: keyword arguments of `Augmentation`.
      rows: this host's positions in every batch; None is all of them.
    """
    module = make_network(bundle, encoder)
    strength = Augmentation(**(augmentation or {}))
    loss = functools.partial(probe_loss, module=module, strength=strength)
    return task_on(
        bundle, "avatar_probe", module, loss, view_batches(bundle, batch_size, seed, rows)
    )


def export_probe(
    path: epath.PathLike,
    params: Params,
    bundle: RenderBundle,
    *,
    encoder: Json | None = None,
    name: str = "avatar-probe",
    facts: Mapping[str, object] | None = None,
) -> str:
    """Writes config.json + model.safetensors (fp16) into `path`; returns the weights' hash.

    Arguments as in `encoder_task.export_encoder`; read by `evaluate/judges/attribute_probe.py`.
    """
    config = {
        "name": name,
        "module": arguments_of(make_encoder(bundle, encoder)),
        "parts": [[part, list(classes)] for part, classes in bundle.view_parts.items()],
        "facts": bundle.facts_of(facts),
    }
    return save_weights(path, FORMAT, config, params)
