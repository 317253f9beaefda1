"""Attention, feed-forward and transformer blocks of the UNet, named as in diffusers."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh

from hyperlora_jax.array_types import Array, DType, Float
from hyperlora_jax.lora.region_shares import Shares, blended, shares_of
from hyperlora_jax.stable_diffusion.networks.attention_kernels import attend, attend_within
from hyperlora_jax.stable_diffusion.networks.blocks import rematerialised, scan_blocks
from hyperlora_jax.stable_diffusion.networks.layers import (
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    gelu,
)


class Attention(nn.Module):
    """Multi-head attention with the projections to_q, to_k, to_v, to_out.0."""

    num_heads: int
    dtype: DType = jnp.float32
    implementation: str = "auto"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Float[Array, "bk m e"] | None = None,
        regions: Shares | None = None,
    ) -> Float[Array, "b n c"]:
        """Attends to `context`, or to itself without one; with regions, every position attends to
        each region's row of it, and the results are mixed."""
        width = x.shape[-1]

        def heads(name: str, states: Array, regions: Shares | None) -> Array:
            projected = Dense(width, False, self.dtype, name=name)(states, regions)
            return projected.reshape(*states.shape[:-1], self.num_heads, width // self.num_heads)

        query = heads("to_q", x, regions)
        if context is None:
            pair = heads("to_k", x, regions), heads("to_v", x, regions)
        else:
            query = jnp.repeat(query, context.shape[0] // x.shape[0], axis=0)
            pair = heads("to_k", context, None), heads("to_v", context, None)
        shares = shares_of(regions, x.shape[1:-1])
        if context is None and shares is not None and regions is not None and regions.apart:
            mixed = attend_within(query, *pair, shares)
        else:
            mixed = attend(query, *pair, self.implementation, self.mesh)
        mixed = mixed.reshape(-1, *x.shape[1:])
        if context is not None and shares is not None:
            mixed = blended(mixed, shares)
        return Dense(width, dtype=self.dtype, name="to_out_0")(mixed, regions)


class GatedGelu(nn.Module):
    """a · gelu(g) of one projection to (a, g): diffusers' GEGLU."""

    features: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], regions: Shares | None = None
    ) -> Float[Array, "b n f"]:
        """Projects and gates."""
        both = Dense(2 * self.features, dtype=self.dtype, name="proj")(x, regions)
        hidden, gate = jnp.split(both, 2, -1)
        return hidden * gelu(gate)


class FeedForward(nn.Module):
    """net.0 = GEGLU to four times the width, net.2 = linear back."""

    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], regions: Shares | None = None
    ) -> Float[Array, "b n c"]:
        """Applied to every token."""
        hidden = GatedGelu(4 * x.shape[-1], self.dtype, name="net_0")(x, regions)
        return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden, regions)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a layer norm, with residuals."""

    num_heads: int
    dtype: DType = jnp.float32
    attention: str = "auto"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Float[Array, "bk m e"],
        regions: Shares | None = None,
    ) -> Float[Array, "b n c"]:
        """Tokens in, tokens out."""

        def norm(name: str) -> LayerNorm:
            return LayerNorm(dtype=self.dtype, name=name)

        def attention(name: str) -> Attention:
            return Attention(self.num_heads, self.dtype, self.attention, self.mesh, name=name)

        x = x + attention("attn1")(norm("norm1")(x), None, regions)
        x = x + attention("attn2")(norm("norm2")(x), context, regions)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x), regions)


class Transformer2D(nn.Module):
    """Group norm, projection in, `depth` transformer blocks over h·w tokens, projection out."""

    num_heads: int
    depth: int
    num_groups: int
    use_linear_projection: bool
    dtype: DType = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    mesh: Mesh | None = None
    scan: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "bk m e"],
        regions: Shares | None = None,
    ) -> Float[Array, "b h w c"]:
        """Positions become tokens and come back with a residual."""
        channels = x.shape[-1]

        def projection(name: str, states: Array) -> Array:
            if self.use_linear_projection:
                return Dense(channels, dtype=self.dtype, name=name)(states, regions)
            return Conv(channels, 1, padding=0, dtype=self.dtype, name=name)(states, regions)

        hidden = GroupNorm(self.num_groups, 1e-6, self.dtype, name="norm")(x, regions)
        hidden = projection("proj_in", hidden).reshape(x.shape[0], -1, channels)
        if self.scan and self.depth > 1 and not self.is_initializing():
            block = self._block(parent=None)
            hidden = scan_blocks(
                lambda variables, states: block.apply(variables, states, context, regions),
                self.variables,
                hidden,
                self.depth,
            )
        else:
            for i in range(self.depth):
                hidden = self._block(name=f"transformer_blocks_{i}")(hidden, context, regions)
        return x + projection("proj_out", hidden.reshape(x.shape))

    def _block(self, **place: Any) -> BasicTransformerBlock:
        block_class = rematerialised(BasicTransformerBlock, self.remat)
        return block_class(self.num_heads, self.dtype, self.attention, self.mesh, **place)
