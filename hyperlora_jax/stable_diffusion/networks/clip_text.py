"""CLIP text encoders of Stable Diffusion, driven by transformers' config.json.

Parameter paths are those of the files: `text_model.encoder.layers.0...`, `text_projection`.
"""

import json
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, DType, Float, Int, Json
from hyperlora_jax.stable_diffusion.networks.attention_kernels import (
    causal_attention,
    xla_attention,
)
from hyperlora_jax.stable_diffusion.networks.configs import ACTIVATIONS, text_settings, to_json
from hyperlora_jax.stable_diffusion.networks.layers import Dense, LayerNorm
from hyperlora_jax.stable_diffusion.networks.lora_argument import check_lora


class ClipTextOutput(NamedTuple):
    """What Stable Diffusion uses of a text encoder."""

    last_hidden_state: Float[Array, "b n e"]  # after the final norm
    penultimate: Float[Array, "b n e"] | None  # input of the last layer, without final norm
    pooled: Float[Array, "b p"]  # at the end token; projected where the model has a projection


class ClipAttention(nn.Module):
    """Self-attention with biases; causal for text."""

    num_heads: int
    causal: bool
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Tokens in, tokens out."""
        width = x.shape[-1]

        def project(name: str, states: Array) -> Array:
            return Dense(width, dtype=self.dtype, name=name)(states)

        query, key, value = (
            project(name, x).reshape(*x.shape[:-1], self.num_heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attention = causal_attention if self.causal else xla_attention
        mixed = attention(query, key, value).reshape(x.shape)
        return project("out_proj", mixed)


class ClipMlp(nn.Module):
    """fc1, activation, fc2."""

    features: int
    activation: str
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Applied to every token."""
        width = x.shape[-1]
        hidden = Dense(self.features, dtype=self.dtype, name="fc1")(x)
        return Dense(width, dtype=self.dtype, name="fc2")(ACTIVATIONS[self.activation](hidden))


class ClipLayer(nn.Module):
    """Pre-norm transformer layer."""

    num_heads: int
    features: int
    activation: str
    epsilon: float
    causal: bool
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Tokens in, tokens out."""
        hidden = LayerNorm(self.epsilon, self.dtype, name="layer_norm1")(x)
        attention = ClipAttention(self.num_heads, self.causal, self.dtype, name="self_attn")
        x = x + attention(hidden)
        hidden = LayerNorm(self.epsilon, self.dtype, name="layer_norm2")(x)
        mlp = ClipMlp(self.features, self.activation, self.dtype, name="mlp")
        return x + mlp(hidden)


class ClipEncoder(nn.Module):
    """The layers."""

    values: Json
    causal: bool
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> list[Float[Array, "b n c"]]:
        """The input and what every layer makes of it."""
        v = self.values
        states = [x]
        for i in range(v["num_hidden_layers"]):
            layer = ClipLayer(
                v["num_attention_heads"],
                v["intermediate_size"],
                v["hidden_act"],
                v["layer_norm_eps"],
                self.causal,
                self.dtype,
                name=f"layers_{i}",
            )
            states.append(layer(states[-1]))
        return states


class TokenEmbeddings(nn.Module):
    """Token plus position embedding."""

    values: Json
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        """Embeds token ids. Raises ValueError for more tokens than positions."""
        v = self.values
        longest = v["max_position_embeddings"]
        if tokens.shape[1] > longest:
            raise ValueError(f"{tokens.shape[1]} tokens, but the encoder has {longest} positions")
        words = nn.Embed(v["vocab_size"], v["hidden_size"], name="token_embedding")(tokens)
        places = nn.Embed(longest, v["hidden_size"], name="position_embedding")
        return (words + places(jnp.arange(tokens.shape[1]))).astype(self.dtype)


class TextTransformer(nn.Module):
    """Embeddings, encoder, final norm and the state at the end token."""

    values: Json
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b n"], skip: int = 0
    ) -> tuple[Array, Array | None, Array]:
        """(last state, penultimate state, state at the end token), the first two of `skip` layers
        before; None where there is no such state."""
        v = self.values
        x = TokenEmbeddings(v, self.dtype, name="embeddings")(tokens)
        states = ClipEncoder(v, True, self.dtype, name="encoder")(x)
        norm = LayerNorm(v["layer_norm_eps"], self.dtype, name="final_layer_norm")
        last = norm(states[-1 - skip])
        before = states[-2 - skip] if skip + 2 <= len(states) else None
        x = norm(states[-1])
        # Configs written before transformers 4.31 say 2: the end token is then the largest id.
        is_end = tokens if v["eos_token_id"] == 2 else tokens == v["eos_token_id"]
        pooled = jnp.take_along_axis(x, is_end.argmax(-1)[:, None, None], axis=1)[:, 0]
        return last, before, pooled


class ClipTextModel(nn.Module):
    """CLIPTextModel, or CLIPTextModelWithProjection where `architectures` says so."""

    source: str
    dtype: DType = jnp.float32

    @property
    def config(self) -> Json:
        """The config.json it was made from."""
        return json.loads(self.source)

    @property
    def values(self) -> Json:
        """Settings with defaults filled in."""
        return text_settings(self.config)

    @property
    def has_projection(self) -> bool:
        """True for CLIPTextModelWithProjection."""
        return self.class_name == "CLIPTextModelWithProjection"

    @property
    def class_name(self) -> str:
        """Its class in transformers."""
        return self.values["architectures"][0]

    @nn.compact
    def __call__(self, tokens: Int[AnyArray, "b n"], skip: int = 0) -> ClipTextOutput:
        """States of token ids [b, n], without the last `skip` layers but for the pooled one;
        padding is attended to, as in Stable Diffusion."""
        v = self.values
        if "lora" in self.variables:
            check_lora(
                self.variables["lora"], self.variables["params"], tokens.shape[0], "text_encoder."
            )
        last, before, pooled = TextTransformer(v, self.dtype, name="text_model")(
            jnp.asarray(tokens), skip
        )
        if self.has_projection:
            project = Dense(v["projection_dim"], False, self.dtype, name="text_projection")
            pooled = project(pooled)
        return ClipTextOutput(last, before, pooled)

    def dummy_inputs(self) -> tuple:
        """Zero inputs of batch 1, enough to initialise or trace."""
        return (jnp.zeros((1, 1), jnp.int32),)


def text_model_from_config(config: Json, dtype: DType = jnp.float32) -> ClipTextModel:
    """Text encoder of a transformers config.json. Raises UserError naming what is unsupported."""
    text_settings(config)
    return ClipTextModel(to_json(config), dtype)
