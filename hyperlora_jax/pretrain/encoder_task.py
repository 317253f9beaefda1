"""Pre-training of the identity encoder: what makes two pictures show the same identity?

Three losses on two views x, x' of the same identity (weights in `EncoderLossWeights`):

  1. contrast: symmetric InfoNCE between projections of the two pooled embeddings;  `info_nce`
  2. picture: a small decoder draws the identity's *neutral* view from the pooled embedding, so
     that the embedding keeps everything visible, not only what tells this batch apart;
  3. parts: linear classification heads for named identity parts, where there are names.

Everything works on arrays (`RenderBundle`): training identities only, rendered once.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from hyperlora_jax.array_types import AnyArray, Array, Float, Int, Json, Params, PRNGKey
from hyperlora_jax.encoders.condition_encoders import SquarePictures, save_encoder
from hyperlora_jax.encoders.image_encoder import Conv, ConvEncoder
from hyperlora_jax.pretrain.render_bundle import RenderBundle, pair_batches
from hyperlora_jax.train.loop import Batches, Task
from hyperlora_jax.train.step import Loss


@dataclasses.dataclass(frozen=True)
class EncoderLossWeights:
    """Weights of the three losses, and what they need.

    Attributes:
      contrast, picture, parts: weights; 0 leaves a loss out.
      temperature: of InfoNCE, on cosines.
      noise: standard deviation of the pixel noise added to the encoder's input.
      recolour: share of identities whose pictures all get the same random order of colour
        channels: shapes in colours that no training identity has. Their parts are not asked for.
    """

    contrast: float = 1.0
    picture: float = 20.0
    parts: float = 0.5
    temperature: float = 0.1
    noise: float = 0.03
    recolour: float = 0.0


class PictureDecoder(nn.Module):
    """Pooled embedding [b, e] -> picture [b, s, s, 3]; nearest upsampling and 3x3 convolutions.

    Attributes:
      image_size: side s in pixels, a multiple of 8.
      width: channels at the smallest size (s / 8); halved at every doubling.
    """

    image_size: int = 32
    width: int = 128

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "b e"]) -> Float[Array, "b s s 3"]:
        """Draws pictures; values are around [0, 1] but not clipped."""
        side = self.image_size // 8
        x = nn.Dense(side * side * self.width, name="start")(pooled)
        x = x.reshape(-1, side, side, self.width)
        for level in range(3):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = Conv(self.width >> (level + 1), (3, 3), name=f"conv_{level}")(nn.silu(x))
        return Conv(3, (3, 3), name="out")(nn.silu(x)) + 0.5


class IdentityNetwork(nn.Module):
    """Encoder and its training heads in one tree: encoder, decoder, projection, one per part.

    Attributes:
      encoder: the module that is kept.
      part_sizes: number of classes of every identity part; one head each.
      projection_dim: width of the contrastive projection.
      decoder_width: see `PictureDecoder`.
      target_size: side of the neutral picture in pixels.
    """

    encoder: ConvEncoder
    part_sizes: tuple[int, ...]
    projection_dim: int
    decoder_width: int
    target_size: int

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the encoder works on."""
        return self.encoder.image_size

    @nn.compact
    def __call__(self, images: Float[AnyArray, "b h w 3"]) -> Params:
        """Returns projection [b, d] of unit length, picture [b, h, w, 3], parts: list of logits."""
        pooled, _ = self.encoder(images)
        projection = nn.Dense(self.projection_dim, name="projection")(pooled)
        norm = jnp.sqrt(jnp.square(projection).sum(-1, keepdims=True) + 1e-8)
        return {
            "projection": projection / norm,
            "picture": PictureDecoder(self.target_size, self.decoder_width, name="decoder")(pooled),
            "parts": [nn.Dense(n, name=f"part_{i}")(pooled) for i, n in enumerate(self.part_sizes)],
        }


def info_nce(
    first: Float[AnyArray, "b d"], second: Float[AnyArray, "b d"], temperature: float
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Symmetric InfoNCE of unit vectors: row k of both shows the same identity.

    loss_k = -(log softmax_j(s_kj)[k] + log softmax_j(s_jk)[k]) / 2 with s = cosine / temperature.

    Returns:
      loss [b] and 1.0 where row k's nearest partner is k [b].
    """
    scores = first @ second.T / temperature
    own = jnp.arange(len(scores))
    rows = optax.softmax_cross_entropy_with_integer_labels(scores, own)
    columns = optax.softmax_cross_entropy_with_integer_labels(scores.T, own)
    return (rows + columns) / 2.0, (scores.argmax(axis=1) == own).astype(jnp.float32)


def encoder_loss(
    params: Params,
    frozen: Params,
    batch: Params,
    key: PRNGKey,
    *,
    module: IdentityNetwork,
    weights: EncoderLossWeights,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """The three losses on one batch of view pairs.

    Args:
      batch: first, second, neutral [b, h, w, 3] uint8 and labels [b, p].
      key: for the pixel noise and the colours.

    Returns:
      losses [b] and metrics contrast, pair_top1, picture_error and part_accuracy, each [b].
    """
    del frozen
    noise_key, colour_key = jax.random.split(key)
    order, changed = channel_orders(colour_key, len(batch["first"]), weights.recolour)

    def picture(name: str) -> Array:
        pixels = batch[name].astype(jnp.float32) / 255.0
        return jnp.take_along_axis(pixels, order[:, None, None, :], axis=3)

    pictures = jnp.concatenate([picture("first"), picture("second")])
    noisy = pictures + weights.noise * jax.random.normal(noise_key, pictures.shape)
    output = cast(Params, module.apply({"params": params}, noisy))
    first, second = jnp.split(output["projection"], 2)
    contrast, top1 = info_nce(first, second, weights.temperature)
    neutral = jnp.tile(picture("neutral"), (2, 1, 1, 1))
    error = _pair_mean(jnp.square(output["picture"] - neutral).mean(axis=(1, 2, 3)))
    metrics = {"contrast": contrast, "pair_top1": top1, "picture_error": error}
    losses = weights.contrast * contrast + weights.picture * error
    if output["parts"]:
        labels = jnp.tile(batch["labels"], (2, 1))
        entropy, accuracy = part_losses(output["parts"], labels)
        losses = losses + weights.parts * _pair_mean(entropy.mean(axis=1)) * (1.0 - changed)
        metrics["part_accuracy"] = _pair_mean(accuracy.mean(axis=1))
    return losses, metrics


def channel_orders(
    key: PRNGKey, count: int, share: float | Float[Array, ""]
) -> tuple[Int[Array, "b 3"], Float[Array, " b"]]:
    """An order of the three colour channels per identity, and 1.0 where it was drawn."""
    order_key, which_key = jax.random.split(key)
    drawn = jnp.argsort(jax.random.uniform(order_key, (count, 3)), axis=1)
    changed = jax.random.uniform(which_key, (count,)) < share
    order = jnp.where(changed[:, None], drawn, jnp.arange(3))
    return order, changed.astype(jnp.float32)


def _pair_mean(values: Array) -> Array:
    """[2 b] of first and second views -> [b]."""
    return (values[: len(values) // 2] + values[len(values) // 2 :]) / 2.0


def part_losses(
    logits: list[Array], labels: Int[AnyArray, "b p"]
) -> tuple[Float[Array, "b p"], Float[Array, "b p"]]:
    """Cross-entropy and accuracy (0 or 1) per example and part, from one logit array per part."""
    entropy = [
        optax.softmax_cross_entropy_with_integer_labels(part, labels[:, i])
        for i, part in enumerate(logits)
    ]
    right = [part.argmax(axis=-1) == labels[:, i] for i, part in enumerate(logits)]
    return jnp.stack(entropy, axis=1), jnp.stack(right, axis=1).astype(jnp.float32)


def make_task(
    bundle: RenderBundle,
    *,
    batch_size: int = 256,
    seed: int = 0,
    encoder: Json | None = None,
    weights: Mapping[str, float] | None = None,
    projection_dim: int = 128,
    decoder_width: int = 128,
    rows: Int[np.ndarray, " b"] | None = None,
) -> Task:
    """The pre-training as a `Task` for `train.loop.fit`.

    Args:
      bundle: training identities.
      batch_size: identities per step (each gives two pictures).
      seed: of the batches.
      encoder: keyword arguments of `ConvEncoder`; image_size defaults to the bundle's.
      weights: keyword arguments of `EncoderLossWeights`.
      projection_dim, decoder_width: see `IdentityNetwork`.
      rows: this host's positions in every batch; None is all of them.
    """
    loss_weights = EncoderLossWeights(**(weights or {}))
    module = make_network(bundle, encoder, loss_weights, projection_dim, decoder_width)
    loss = functools.partial(encoder_loss, module=module, weights=loss_weights)
    batches = pair_batches(bundle, batch_size, seed, rows)
    return task_on(bundle, "avatar_encoder", module, loss, batches)


def task_on(
    bundle: RenderBundle, name: str, module: SquarePictures, loss: Loss, batches: Batches
) -> Task:
    """A `Task` that trains a module on the pictures of a bundle."""
    size = module.image_size
    return Task(
        name=name,
        init=lambda key: module.init(key, jnp.zeros((1, size, size, 3)))["params"],
        loss=loss,
        frozen={},
        batches=batches,
        facts={"data": dict(bundle.facts), "num_identities": bundle.num_identities},
    )


def make_network(
    bundle: RenderBundle,
    encoder: Json | None = None,
    weights: EncoderLossWeights = EncoderLossWeights(),
    projection_dim: int = 128,
    decoder_width: int = 128,
) -> IdentityNetwork:
    """The encoder with the heads that the weights ask for; arguments as in `make_task`."""
    sizes = tuple(len(classes) for classes in bundle.identity_parts.values())
    return IdentityNetwork(
        encoder=make_encoder(bundle, encoder),
        part_sizes=sizes if weights.parts else (),
        projection_dim=projection_dim,
        decoder_width=decoder_width,
        target_size=bundle.image_size,
    )


def make_encoder(bundle: RenderBundle, encoder: Json | None = None) -> ConvEncoder:
    """`ConvEncoder(**encoder)` with the bundle's image size where none is given."""
    kwargs = {"image_size": bundle.image_size, **(encoder or {})}
    if "widths" in kwargs:
        kwargs["widths"] = tuple(kwargs["widths"])
    return ConvEncoder(**kwargs)


def export_encoder(
    path: epath.PathLike,
    params: Params,
    bundle: RenderBundle,
    *,
    encoder: Json | None = None,
    name: str = "avatar-encoder",
    facts: Mapping[str, object] | None = None,
) -> str:
    """Writes the encoder alone (no heads) with `save_encoder`; returns its hash.

    Args:
      path: folder to write.
      params: parameters (or their moving average) of the trained task.
      bundle: what it was trained on; its facts are recorded.
      encoder: the same keyword arguments that `make_task` had.
      name: recorded name.
      facts: more to record, e.g. steps and seconds.
    """
    module = make_encoder(bundle, encoder)
    return save_encoder(path, module, params["encoder"], name, bundle.facts_of(facts))
