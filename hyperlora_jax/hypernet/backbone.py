"""Transformer over LoRA tokens: adaLN-Zero on a modulator (time and pooled condition), and
cross-attention to the condition's tokens.

    h ← h + gate₁ · SelfAttention(modulate₁(LN(h)))
    h ← h + gate₂ · CrossAttention(modulate₂(LN(h)), condition tokens)
    h ← h + gate₃ · MLP(modulate₃(LN(h)))

All modulations come from one zero-initialised linear map of the modulator (arXiv
2212.09748), so that every block starts as the identity. `conditioning="adalora"` adds, between
the two linears of the MLP, a low-rank map that the modulator writes: x ← x + (x·Down)·Upᵀ
(arXiv 2412.02352); its Up half starts at zero.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, Bool, DType, Float, PRNGKey

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
    """x + (x·Down)·Upᵀ with Down and Up `[c, rank]` written by a modulator."""

    rank: int = 8
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "l n c"], modulator: Float[Array, "l e"]
    ) -> Float[Array, "l n c"]:
        """Adapts the tokens of every LoRA by its own modulator."""
        num_loras, _, width = x.shape
        hidden = nn.silu(nn.Dense(4 * self.rank, dtype=self.dtype, name="hidden")(modulator))
        down = nn.Dense(width * self.rank, dtype=self.dtype, name="down")(hidden)
        zeros = nn.initializers.zeros
        up = nn.Dense(width * self.rank, dtype=self.dtype, kernel_init=zeros, name="up")(hidden)
        down = down.reshape(num_loras, width, self.rank) / width**0.5
        up = up.reshape(num_loras, width, self.rank)
        return x + jnp.einsum("lnr,lcr->lnc", jnp.einsum("lnc,lcr->lnr", x, down), up)


class Projection(nn.Module):
    """Kernel [*inputs, *outputs] and bias [*outputs] of a linear map, drawn and named as
    nn.DenseGeneral does."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        """Both, in `dtype`."""
        shape = (*self.inputs, *self.outputs)
        flat = math.prod(self.inputs), math.prod(self.outputs)

        def drawn(key: PRNGKey) -> Array:
            return nn.initializers.lecun_normal()(key, flat).reshape(shape)

        kernel = self.param("kernel", drawn)
        bias = self.param("bias", nn.initializers.zeros, self.outputs)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention of the tokens to a context (themselves, or the condition).

    With q = Wq x, k = Wk y and v = Wv y of a head,

        softmax(q kᵀ) v Wo = softmax(x (Wqᵀ k)ᵀ) (v Wo)

    whose right side costs less where the context is short: x has as many columns as heads times
    context tokens to be multiplied by, not its width.
    """

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
        (_, count, width), length = x.shape, context.shape[1]
        heads = (self.num_heads, width // self.num_heads)

        def projection(name: str, *inputs: int, outputs: tuple[int, ...] = heads):
            return Projection(inputs, outputs, self.dtype, name=name)()

        query, key, value = (projection(name, width) for name in ("query", "key", "value"))
        out, bias = projection("out", *heads, outputs=(width,))
        x, context = x.astype(self.dtype), context.astype(self.dtype)
        visible = None if mask is None else mask[:, None, None, :]
        keys, values = (jnp.einsum("lmc,chd->lmhd", context, w) + b for w, b in (key, value))
        folded = count * length * self.num_heads + length * width < count * (width + length)
        if not folded:
            queries = jnp.einsum("lnc,chd->lnhd", x, query[0]) + query[1]
            mixed = jax.nn.dot_product_attention(queries, keys, values, mask=visible)
            return jnp.einsum("lnhd,hdc->lnc", mixed, out) + bias
        looks = jnp.einsum("lmhd,chd->lhmc", keys, query[0])
        offsets = jnp.einsum("lmhd,hd->lhm", keys, query[1])[:, :, None]
        scores = jnp.einsum("lnc,lhmc->lhnm", x, looks) + offsets
        scores = scores.astype(jnp.float32) * heads[1] ** -0.5
        if visible is not None:
            scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
        shares = jax.nn.softmax(scores).astype(self.dtype)
        answers = jnp.einsum("lmhd,hdc->lhmc", values, out)
        return jnp.einsum("lhnm,lhmc->lnc", shares, answers) + bias


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
        modulator: Float[Array, "l c"],
        mask: Bool[Array, "l m"] | None = None,
    ) -> tuple[Float[Array, "l n c"], None]:
        """Returns (x, None): the second value is what nn.scan collects."""
        width = x.shape[-1]
        zeros = nn.initializers.zeros
        modulation = nn.Dense(9 * width, dtype=self.dtype, kernel_init=zeros, name="modulation")
        parts = jnp.split(modulation(nn.silu(modulator)), 9, axis=-1)
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
            hidden = AdaLora(self.adapter_rank, self.dtype, name="adalora")(hidden, modulator)
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
        modulator: Float[Array, "l c"],
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
            return blocks(*settings, self.dtype, name="blocks")(x, context, modulator, mask)[0]
        for index in range(self.depth):
            x, _ = block(*settings, self.dtype, name=f"block_{index}")(x, context, modulator, mask)
        return x
