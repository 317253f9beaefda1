"""Transformer over LoRA tokens: adaLN-Zero on (time, pooled condition), cross-attention to the
condition's tokens.

    h ← h + gate₁ · SelfAttention(modulate₁(LN(h)))
    h ← h + gate₂ · CrossAttention(modulate₂(LN(h)), condition tokens)
    h ← h + gate₃ · MLP(modulate₃(LN(h)))

All modulations come from one zero-initialised linear map of the conditioning vector (arXiv
2212.09748), so that every block starts as the identity. `conditioning="adalora"` adds, between
the two linears of the MLP, a low-rank map that the condition writes: x ← x + (x·Down)·Upᵀ
(arXiv 2412.02352); its Up half starts at zero.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, Bool, DType, Float

CONDITIONINGS = ("adanorm", "adalora")


def modulate(
    x: Float[Array, "l n c"], shift: Float[Array, "l c"], scale: Float[Array, "l c"]
) -> Float[Array, "l n c"]:
    """x · (1 + scale) + shift, the same for all tokens of a LoRA."""
    return x * (1 + scale[:, None]) + shift[:, None]


def timestep_features(time: Float[Array, " l"], width: int) -> Float[Array, "l c"]:
    """Sinusoidal features of a time in [0, 1]."""
    frequencies = jnp.exp(jnp.linspace(0.0, jnp.log(1000.0), width // 2))
    angles = time[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class AdaLora(nn.Module):
    """x + (x·Down)·Upᵀ with Down, Up `[c, rank]` written by the conditioning vector."""

    rank: int = 8
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "l n c"], condition: Float[Array, "l e"]
    ) -> Float[Array, "l n c"]:
        """Adapts the tokens of every LoRA by its own condition."""
        num_loras, _, width = x.shape
        hidden = nn.silu(nn.Dense(4 * self.rank, dtype=self.dtype, name="hidden")(condition))
        down = nn.Dense(width * self.rank, dtype=self.dtype, name="down")(hidden)
        zeros = nn.initializers.zeros
        up = nn.Dense(width * self.rank, dtype=self.dtype, kernel_init=zeros, name="up")(hidden)
        down = down.reshape(num_loras, width, self.rank) / width**0.5
        up = up.reshape(num_loras, width, self.rank)
        return x + jnp.einsum("lnr,lcr->lnc", jnp.einsum("lnc,lcr->lnr", x, down), up)


class Attention(nn.Module):
    """Multi-head attention of the tokens to a context (themselves, or the condition)."""

    num_heads: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "l n c"],
        context: Float[Array, "l m c"],
        mask: Bool[Array, "l m"] | None = None,
    ) -> Float[Array, "l n c"]:
        """Attends from x to those tokens of the context that the mask keeps."""
        width = x.shape[-1]
        shape = (self.num_heads, width // self.num_heads)
        query = nn.DenseGeneral(shape, dtype=self.dtype, name="query")(x)
        key = nn.DenseGeneral(shape, dtype=self.dtype, name="key")(context)
        value = nn.DenseGeneral(shape, dtype=self.dtype, name="value")(context)
        visible = None if mask is None else mask[:, None, None, :]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=visible)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(mixed)


class Block(nn.Module):
    """One transformer block; see the head of this file."""

    num_heads: int
    mlp_ratio: int = 4
    conditioning: str = "adanorm"
    adapter_rank: int = 8
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "l n c"],
        context: Float[Array, "l m c"],
        condition: Float[Array, "l c"],
        mask: Bool[Array, "l m"] | None = None,
    ) -> tuple[Float[Array, "l n c"], None]:
        """Returns (x, None): the second value is what nn.scan collects."""
        width = x.shape[-1]
        zeros = nn.initializers.zeros
        modulation = nn.Dense(9 * width, dtype=self.dtype, kernel_init=zeros, name="modulation")
        parts = jnp.split(modulation(nn.silu(condition)), 9, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = parts

        def normed(shift, scale):
            norm = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)
            return modulate(norm(x), shift, scale)

        hidden = normed(shift1, scale1)
        attention = Attention(self.num_heads, self.dtype, name="self_attention")
        x = x + gate1[:, None] * attention(hidden, hidden)
        cross = Attention(self.num_heads, self.dtype, name="cross_attention")
        x = x + gate2[:, None] * cross(normed(shift2, scale2), context, mask)
        hidden = nn.Dense(self.mlp_ratio * width, dtype=self.dtype, name="mlp_in")(
            normed(shift3, scale3)
        )
        if self.conditioning == "adalora":
            hidden = AdaLora(self.adapter_rank, self.dtype, name="adalora")(hidden, condition)
        hidden = nn.Dense(width, dtype=self.dtype, name="mlp_out")(nn.gelu(hidden))
        return x + gate3[:, None] * hidden, None


class Backbone(nn.Module):
    """`depth` blocks, optionally rematerialised and as one scan over stacked parameters."""

    depth: int
    num_heads: int
    mlp_ratio: int = 4
    conditioning: str = "adanorm"
    adapter_rank: int = 8
    remat: bool = False
    scan: bool = False
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "l n c"],
        context: Float[Array, "l m c"],
        condition: Float[Array, "l c"],
        mask: Bool[Array, "l m"] | None = None,
    ) -> Float[Array, "l n c"]:
        """Runs all blocks; `mask` says which tokens of the context are real."""
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"Got: {self.conditioning=}, expected one of {CONDITIONINGS}")
        settings = (self.num_heads, self.mlp_ratio, self.conditioning, self.adapter_rank)
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=self.depth,
            )
            return blocks(*settings, self.dtype, name="blocks")(x, context, condition, mask)[0]
        for index in range(self.depth):
            x, _ = block(*settings, self.dtype, name=f"block_{index}")(x, context, condition, mask)
        return x
