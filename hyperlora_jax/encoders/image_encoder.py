"""A small convolutional image encoder in Flax: pictures in, one pooled embedding and tokens out.

Convolution stages with GroupNorm halve the picture from stage to stage (32 -> 16 -> 8 pixels with
the defaults). Every cell of the last stage becomes one token; the pooled embedding is a dense map
of *all* tokens, each reduced to a few channels first, so that it knows where something was seen
(mean pooling would forget it). Both come out with zero mean and unit variance per vector, which is
what a network that is conditioned on them wants. Heads (classes, reconstruction) live with the
tasks that train the encoder, never here.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, DType, Float, Params, PRNGKey
from hyperlora_jax.stable_diffusion.networks.convolutions import flax_conv2d

Conv = functools.partial(nn.Conv, conv_general_dilated=flax_conv2d)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); the last convolution starts at zero.

    Attributes:
      width: channels of input and output.
      groups: groups of the two GroupNorms; must divide `width`.
      dtype: computation type (parameters stay float32).
    """

    width: int
    groups: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns an array of the input's shape."""
        y = nn.GroupNorm(self.groups, dtype=self.dtype, name="norm_in")(x)
        y = Conv(self.width, (3, 3), dtype=self.dtype, name="conv_in")(nn.silu(y))
        y = nn.GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(y)
        zeros = nn.initializers.zeros
        y = Conv(self.width, (3, 3), kernel_init=zeros, dtype=self.dtype, name="conv_out")(
            nn.silu(y)
        )
        return jnp.asarray(x + y)


class ConvEncoder(nn.Module):
    """Pictures -> (pooled embedding, tokens).

    Attributes:
      image_size: side in pixels of the square picture the first convolution sees; other sizes are
        resized to it. Must be divisible by 2 ** (len(widths) - 1).
      widths: channels per stage; every stage after the first halves the picture.
      blocks: residual blocks in every stage after the first (the first, at full size, has none).
      embedding_dim: width of the pooled embedding and of every token.
      pool_channels: channels that each token keeps on its way into the pooled embedding.
      groups: groups of every GroupNorm; must divide every width.
      dtype: computation type (parameters and outputs are float32).
    """

    image_size: int = 32
    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1
    embedding_dim: int = 256
    pool_channels: int = 16
    groups: int = 8
    dtype: DType = jnp.float32

    @property
    def num_tokens(self) -> int:
        """Cells of the last stage."""
        return (self.image_size // 2 ** (len(self.widths) - 1)) ** 2

    @nn.compact
    def __call__(
        self, images: Float[AnyArray, "b h w 3"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b n e"]]:
        """Encodes pictures in [0, 1].

        Returns:
          pooled [b, embedding_dim] and tokens [b, num_tokens, embedding_dim], float32.

        Raises:
          ValueError: image_size or a width is not divisible as described above.
        """
        self._check()
        x = resize(jnp.asarray(images), self.image_size) * 2.0 - 1.0
        x = Conv(self.widths[0], (3, 3), dtype=self.dtype, name="stem")(x)
        for stage, width in enumerate(self.widths[1:], start=1):
            x = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype, name=f"norm_{stage}")(x))
            x = Conv(width, (3, 3), strides=(2, 2), dtype=self.dtype, name=f"down_{stage}")(x)
            for block in range(self.blocks):
                name = f"stage_{stage}_block_{block}"
                x = ResidualBlock(width, self.groups, self.dtype, name=name)(x)
        x = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype, name="norm_last")(x))
        tokens = nn.Dense(self.embedding_dim, dtype=self.dtype, name="token_projection")(
            x.reshape(x.shape[0], self.num_tokens, self.widths[-1])
        )
        reduced = nn.silu(nn.Dense(self.pool_channels, dtype=self.dtype, name="pool_in")(tokens))
        pooled = nn.Dense(self.embedding_dim, dtype=self.dtype, name="pool_out")(
            reduced.reshape(reduced.shape[0], -1)
        )
        return _standardise(pooled), _standardise(tokens)

    def _check(self) -> None:
        factor = 2 ** (len(self.widths) - 1)
        if self.image_size % factor:
            raise ValueError(
                f"image_size must be divisible by {factor}. Got: {self.image_size=} {self.widths=}"
            )
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups must divide widths. Got: {self.groups=} {self.widths=}")


def resize(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b s s c"]:
    """Resizes to `size` x `size` pixels; no copy when it fits already.

    A whole number of pixels per pixel is averaged box by box, so that drawn pixels stay crisp;
    everything else is antialiased linear interpolation.
    """
    batch, height, width, channels = images.shape
    if (height, width) == (size, size):
        return images
    if height % size == 0 and width % size == 0:
        boxes = images.reshape(batch, size, height // size, size, width // size, channels)
        return boxes.mean(axis=(2, 4))
    return jax.image.resize(images, (batch, size, size, channels), "linear")


def init_encoder(module: ConvEncoder, key: PRNGKey) -> Params:
    """Random parameters of `module`."""
    shape = (1, module.image_size, module.image_size, 3)
    return jax.jit(module.init)(key, jnp.zeros(shape))["params"]


def _standardise(x: Array) -> Array:
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6)
