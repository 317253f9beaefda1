"""AutoencoderKL, NHWC, driven by its config.json; parameter paths follow diffusers."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, DType, Float, Json
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.networks.attention_kernels import xla_attention
from hyperlora_jax.stable_diffusion.networks.configs import check_divides, read_config, to_json
from hyperlora_jax.stable_diffusion.networks.layers import (
    Conv,
    Dense,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
)

_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_FIXED = {"act_fn": ("silu", "swish"), "attention_head_dim": ()}
_EPSILON = 1e-6
_BELOW_RIGHT = ((0, 1), (0, 1))


def _settings(config: Json) -> Json:
    values = read_config(config, _DEFAULTS, _FIXED, frozenset(), "autoencoder")
    for key, only in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if other := set(values[key]) - {only}:
            raise UserError(
                f"autoencoder config: {key} has {sorted(other)[0]!r}, which is not supported, "
                f"expected {only!r}"
            )
        if len(values[key]) != len(values["block_out_channels"]):
            raise UserError(
                f"autoencoder config: {key} has {len(values[key])} values, expected "
                f"{len(values['block_out_channels'])}"
            )
    if isinstance(values["layers_per_block"], tuple):
        raise UserError("autoencoder config: layers_per_block is a list, expected one number")
    for width in values["block_out_channels"]:
        groups = values["norm_num_groups"]
        check_divides(groups, width, "norm_num_groups", "block_out_channels", "autoencoder")
    return values


class SpatialAttention(nn.Module):
    """Single-head self-attention over h·w positions with a residual."""

    num_groups: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Every position attends to every other."""
        channels = x.shape[-1]
        hidden = GroupNorm(self.num_groups, _EPSILON, self.dtype, name="group_norm")(x)
        hidden = hidden.reshape(x.shape[0], -1, channels)
        query, key, value = (
            Dense(channels, dtype=self.dtype, name=name)(hidden)[:, :, None]
            for name in ("to_q", "to_k", "to_v")
        )
        mixed = xla_attention(query, key, value)[:, :, 0]
        mixed = Dense(channels, dtype=self.dtype, name="to_out_0")(mixed)
        return x + mixed.reshape(x.shape)


class CoderBlock(nn.Module):
    """Resnets, then an optional down- or upsampling; the mid block has attention in between."""

    features: int
    num_resnets: int
    num_groups: int
    resample: str | None = None  # "down", "up"
    attention: bool = False
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b hh ww f"]:
        """One resolution."""
        for i in range(self.num_resnets):
            if i == 1 and self.attention:
                x = SpatialAttention(self.num_groups, self.dtype, name="attentions_0")(x)
            x = ResnetBlock(
                self.features, self.num_groups, _EPSILON, self.dtype, name=f"resnets_{i}"
            )(x)
        if self.resample == "down":
            return Downsample(_BELOW_RIGHT, self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            return Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class Coder(nn.Module):
    """The encoder (`down_blocks`, then mid) or the decoder (mid, then `up_blocks`)."""

    channels: tuple[int, ...]  # in the order of the blocks
    num_resnets: int
    num_groups: int
    out_channels: int
    is_encoder: bool
    mid_attention: bool = True
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b hh ww o"]:
        """Image to moments, or latents to image."""
        x = Conv(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        if not self.is_encoder:
            x = self._mid(self.channels[0])(x)
        prefix, resample = ("down", "down") if self.is_encoder else ("up", "up")
        for i, features in enumerate(self.channels):
            last = i == len(self.channels) - 1
            x = CoderBlock(
                features,
                self.num_resnets,
                self.num_groups,
                None if last else resample,
                dtype=self.dtype,
                name=f"{prefix}_blocks_{i}",
            )(x)
        if self.is_encoder:
            x = self._mid(self.channels[-1])(x)
        x = GroupNorm(self.num_groups, _EPSILON, self.dtype, name="conv_norm_out")(x)
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(jax.nn.silu(x))

    def _mid(self, features: int) -> CoderBlock:
        return CoderBlock(
            features,
            2,
            self.num_groups,
            attention=self.mid_attention,
            dtype=self.dtype,
            name="mid_block",
        )


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] to latents (mean, log-variance) and back; unscaled latents."""

    source: str
    dtype: DType = jnp.float32

    @property
    def config(self) -> Json:
        """The config.json it was made from."""
        return json.loads(self.source)

    @property
    def values(self) -> Json:
        """Settings with defaults filled in."""
        return _settings(self.config)

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along one axis."""
        return 2 ** (len(self.values["block_out_channels"]) - 1)

    def setup(self):
        """Creates the encoder, the decoder and the 1×1 convolutions between them."""
        v = self.values
        latents, channels = v["latent_channels"], v["block_out_channels"]
        layers, groups, attention = (
            v["layers_per_block"],
            v["norm_num_groups"],
            v["mid_block_add_attention"],
        )
        self.encoder = Coder(channels, layers, groups, 2 * latents, True, attention, self.dtype)
        self.decoder = Coder(
            channels[::-1], layers + 1, groups, v["out_channels"], False, attention, self.dtype
        )
        if v["use_quant_conv"]:
            self.quant_conv = Conv(2 * latents, 1, padding=0, dtype=self.dtype)
        if v["use_post_quant_conv"]:
            self.post_quant_conv = Conv(latents, 1, padding=0, dtype=self.dtype)

    def encode(
        self, images: Float[AnyArray, "b h w c"]
    ) -> tuple[Float[Array, "b hh ww z"], Float[Array, "b hh ww z"]]:
        """Mean and log-variance (clipped to [-30, 20]) of the posterior."""
        moments = self.encoder(jnp.asarray(images, self.dtype))
        if self.values["use_quant_conv"]:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[AnyArray, "b hh ww z"]) -> Float[Array, "b h w c"]:
        """Images in about [-1, 1]."""
        latents = jnp.asarray(latents, self.dtype)
        if self.values["use_post_quant_conv"]:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, images: Float[AnyArray, "b h w c"]) -> Float[Array, "b h w c"]:
        """Decodes the posterior mean."""
        return self.decode(self.encode(images)[0])

    def dummy_inputs(self) -> tuple:
        """Zero inputs of batch 1, enough to initialise or trace."""
        size = self.downsampling
        return (jnp.zeros((1, size, size, self.values["in_channels"])),)

    def scale_latents(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """Latents as the UNet sees them."""
        shift, scale = self._affine()
        return (latents - shift) * scale

    def unscale_latents(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """Inverse of `scale_latents`."""
        shift, scale = self._affine()
        return latents / scale + shift

    def _affine(self) -> tuple[Array | float, Array | float]:
        v = self.values
        if v["latents_mean"] is not None and v["latents_std"] is not None:
            mean, std = jnp.asarray(v["latents_mean"]), jnp.asarray(v["latents_std"])
            return mean, v["scaling_factor"] / std
        return v["shift_factor"] or 0.0, v["scaling_factor"]


def vae_from_config(config: Json, dtype: DType = jnp.float32) -> AutoencoderKL:
    """Autoencoder of a diffusers config.json. Raises UserError naming what it does not support."""
    _settings(config)
    return AutoencoderKL(to_json(config), dtype)
