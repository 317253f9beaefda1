"""CLIP vision encoders, driven by transformers' config.json.

Parameter paths are those of the files: `vision_model.encoder.layers.0...`, `visual_projection`. The
files' own spelling `pre_layrnorm` is kept.
"""

import json
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, DType, Float, Json
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.networks.clip_text import ClipEncoder
from hyperlora_jax.stable_diffusion.networks.configs import (
    ACTIVATIONS,
    IGNORED,
    read_config,
    to_json,
)
from hyperlora_jax.stable_diffusion.networks.layers import Conv, Dense, LayerNorm

CLASSES = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "architectures": ("CLIPVisionModel",),
}
_FIXED = {
    "attention_dropout": (0,),
    "dropout": (0,),
    "model_type": ("clip_vision_model",),
    "tie_word_embeddings": (True, False),
}


class ClipVisionOutput(NamedTuple):
    """Without a projection what transformers calls pooler_output and last_hidden_state; with one
    image_embeds, and all tokens normed and projected like it."""

    pooled: Float[Array, "b p"]
    tokens: Float[Array, "b n p"]  # class token first


def vision_settings(config: Json) -> Json:
    """Settings with defaults filled in. Raises UserError naming what is not supported."""
    what = "vision encoder"
    values = read_config(config, _DEFAULTS, _FIXED, IGNORED, what)
    if values["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"{what} config: hidden_act = {values['hidden_act']!r} is not supported, expected one "
            f"of {sorted(ACTIVATIONS)}"
        )
    if len(values["architectures"]) != 1 or values["architectures"][0] not in CLASSES:
        raise UserError(
            f"{what} config: architectures = {list(values['architectures'])!r} is not supported, "
            f"expected one of {list(CLASSES)}"
        )
    return values


class PatchEmbeddings(nn.Module):
    """Class token, then one token for each patch, with learned positions."""

    values: Json
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b n e"]:
        """Row by row."""
        v = self.values
        width, patch = v["hidden_size"], v["patch_size"]
        convolution = Conv(
            width, patch, patch, 0, use_bias=False, dtype=self.dtype, name="patch_embedding"
        )
        patches = convolution(pixels).reshape(pixels.shape[0], -1, width)
        first = self.param("class_embedding", nn.initializers.zeros, (width,)).astype(self.dtype)
        tokens = jnp.concatenate(
            [jnp.broadcast_to(first, (pixels.shape[0], 1, width)), patches], axis=1
        )
        number = (v["image_size"] // patch) ** 2 + 1
        places = nn.Embed(number, width, name="position_embedding")(jnp.arange(number))
        return tokens + places.astype(self.dtype)


class VisionTransformer(nn.Module):
    """Embeddings, norm, encoder, norm."""

    values: Json
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w c"]) -> tuple[Array, Array]:
        """(last state, the same after the final norm)."""
        v = self.values
        x = PatchEmbeddings(v, self.dtype, name="embeddings")(pixels)
        x = LayerNorm(v["layer_norm_eps"], self.dtype, name="pre_layrnorm")(x)
        x = ClipEncoder(v, False, self.dtype, name="encoder")(x)[-1]
        norm = LayerNorm(v["layer_norm_eps"], self.dtype, name="post_layernorm")
        return x, norm(x)


class ClipVisionModel(nn.Module):
    """CLIPVisionModel, or CLIPVisionModelWithProjection where `architectures` says so."""

    source: str
    dtype: DType = jnp.float32

    @property
    def config(self) -> Json:
        """The config.json it was made from."""
        return json.loads(self.source)

    @property
    def values(self) -> Json:
        """Settings with defaults filled in."""
        return vision_settings(self.config)

    @property
    def has_projection(self) -> bool:
        """True for CLIPVisionModelWithProjection."""
        return self.values["architectures"][0] == CLASSES[1]

    @property
    def image_size(self) -> int:
        """Side in pixels of the picture that it wants."""
        return self.values["image_size"]

    @nn.compact
    def __call__(self, pixels: Float[AnyArray, "b h w c"]) -> ClipVisionOutput:
        """States of normalised pictures of `image_size`."""
        v = self.values
        last, normed = VisionTransformer(v, self.dtype, name="vision_model")(
            jnp.asarray(pixels, self.dtype)
        )
        if not self.has_projection:
            return ClipVisionOutput(normed[:, 0], last)
        project = Dense(v["projection_dim"], False, self.dtype, name="visual_projection")
        tokens = project(normed)
        return ClipVisionOutput(tokens[:, 0], tokens)

    def dummy_inputs(self) -> tuple:
        """Zero inputs of batch 1, enough to initialise or trace."""
        v = self.values
        return (jnp.zeros((1, v["image_size"], v["image_size"], v["num_channels"])),)


def vision_model_from_config(config: Json, dtype: DType = jnp.float32) -> ClipVisionModel:
    """Encoder of a transformers config.json. Raises UserError naming what is unsupported."""
    vision_settings(config)
    return ClipVisionModel(to_json(config), dtype)
