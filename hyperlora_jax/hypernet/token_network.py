"""The token hypernetwork: condition → LoRA.

    lora = centre + scale · head(backbone(token embeddings, condition))

`centre` is a learned LoRA, the same for every subject. It starts with a random down side and a zero
up side (or at the mean of a LoRA-target dataset), `scale` is one number per site and side. With the
zero-initialised up heads the network at step 0 writes a LoRA that changes nothing.

With `output="whitened"` the numbers are in units of a dataset's spread around its mean, as
diffusion over weights wants them: centre, heads and scales then start at 0, 0 and 1.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, DType, Float, Params
from hyperlora_jax.hypernet.backbone import Backbone, timestep_features
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.hypernet.token_layout import (
    Head,
    TokenGroup,
    TokenLayout,
    assemble,
    disassemble,
    token_features,
)
from hyperlora_jax.parallel.sharding import split_activations


class TokenHypernetwork(nn.Module):
    """Writes LoRAs from condition embeddings.

    Attributes:
        layout: which token writes what (`token_layout.py`).
        width: features of a token.
        depth: transformer blocks.
        down: "generated" or "learned": with "learned" all subjects share the down side, and a LoRA
            is linear in what the network writes.
        up_scale: size of the up side that a unit output writes.
        output: "lora" or "whitened", see the head of this file.
        input_noise: also read a (noisy) LoRA and a time, as diffusion and iteration need. A gate
            per group, zero at first, lets the LoRA through to the output: what is noise in it
            would not fit through the tokens' width.
    """

    layout: TokenLayout
    width: int = 192
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    conditioning: str = "adanorm"
    adapter_rank: int = 8
    head: str = "dense"
    basis_size: int = 64
    down: str = "generated"
    up_scale: float = 0.1
    output: str = "lora"
    input_noise: bool = False
    remat: bool = False
    scan: bool = False
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        condition: Condition,
        noisy: Params | None = None,
        time: Float[Array, " l"] | None = None,
    ) -> Params:
        """LoRA tree with leading axis l for the conditions."""
        if self.down not in ("generated", "learned"):
            raise ValueError(f"Got: {self.down=}, expected 'generated' or 'learned'")
        if self.output not in ("lora", "whitened"):
            raise ValueError(f"Got: {self.output=}, expected 'lora' or 'whitened'")
        num_loras = condition.pooled.shape[0]
        x = self._token_embeddings(num_loras)
        pooled, tokens = _normed(condition.pooled), _normed(condition.tokens)
        modulator = nn.Dense(self.width, dtype=self.dtype, name="pooled_in")(pooled)
        if self.input_noise:
            if noisy is None or time is None:
                raise ValueError("a network with input_noise needs a noisy LoRA and a time")
            parts = self._unit_parts(noisy)
            x = x + self._noise_embeddings(parts)
            features = nn.Dense(self.width, name="time_in")(timestep_features(time, self.width))
            modulator = modulator + nn.Dense(self.width, name="time_out")(nn.silu(features))
        modulator = nn.Dense(self.width, dtype=self.dtype, name="condition")(nn.silu(modulator))
        context = nn.Dense(self.width, dtype=self.dtype, name="tokens_in")(tokens)
        x = Backbone(
            self.depth,
            self.num_heads,
            self.mlp_ratio,
            self.conditioning,
            self.adapter_rank,
            self.remat,
            self.scan,
            self.dtype,
            name="backbone",
        )(x, context, modulator, condition.mask)
        shift, scale = jnp.split(
            nn.Dense(2 * self.width, dtype=self.dtype, name="final")(nn.silu(modulator)), 2, -1
        )
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x) * (1 + scale[:, None]) + shift[:, None]
        gates = None
        if self.input_noise:
            zeros, count = nn.initializers.zeros, len(self.layout.groups)
            gates = nn.Dense(count, kernel_init=zeros, name="gates")(nn.silu(modulator)), parts
        return self._write(x, gates)

    def _token_embeddings(self, num_loras: int) -> Float[Array, "l n c"]:
        features = token_features(self.layout)
        total = 0.0
        for name, ids in features.items():
            count = int(ids.max()) + 1
            table = self.param(f"embed_{name}", nn.initializers.normal(0.5), (count, self.width))
            total = total + table[ids]
        shape = (num_loras, self.layout.num_tokens, self.width)
        return split_activations(jnp.broadcast_to(jnp.asarray(total, self.dtype), shape))

    def unit_size(self, group: TokenGroup) -> float:
        """Size of the numbers that a unit output of a group's head writes."""
        if self.output == "whitened":
            return 1.0
        return self.up_scale if group.side == "up" else group.width**-0.5

    def _unit_parts(self, lora: Params) -> list[Array]:
        """The groups of a LoRA in units of what heads write."""
        parts = disassemble(self.layout, lora)
        groups = self.layout.groups
        return [part / self.unit_size(group) for group, part in zip(groups, parts, strict=True)]

    def _noise_embeddings(self, parts: list[Array]) -> Float[Array, "l n c"]:
        columns = [
            nn.Dense(self.width, dtype=self.dtype, name=f"noise_{group.side}_{group.width}")(
                part.reshape(*part.shape[:2], -1)
            )
            for group, part in zip(self.layout.groups, parts, strict=True)
        ]
        return jnp.concatenate(columns, axis=1)

    def _write(self, x: Float[Array, "l n c"], gates: tuple[Array, list[Array]] | None) -> Params:
        outputs, start = [], 0
        whitened = self.output == "whitened"
        for number, group in enumerate(self.layout.groups):
            stop = start + len(group.sites)
            name = f"{group.side}_{group.width}"
            shape = (len(group.sites), self.layout.components, group.width)
            init = nn.initializers.zeros if group.side == "up" or whitened else _centre_init
            centre = self.param(f"centre_{name}", init, shape)
            output = split_activations(jnp.broadcast_to(centre, (x.shape[0], *shape)))
            if group.side == "up" or self.down == "generated":
                head = Head(
                    group,
                    self.layout.components,
                    self.head,
                    self.basis_size,
                    self.dtype,
                    zero=group.side == "up" or whitened,
                    name=f"head_{name}",
                )
                written = head(x[:, start:stop])
                if gates is not None:
                    written = written + gates[0][:, number, None, None, None] * gates[1][number]
                output = output + self.unit_size(group) * written
            outputs.append(output)
            start = stop
        return assemble(self.layout, outputs)


def _normed(x: Array) -> Array:
    """Scale-free condition: encoders differ in the size of their embeddings."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _centre_init(key, shape, dtype=jnp.float32):
    """Normal with variance 1/width: a unit input gives unit components."""
    return jax.random.normal(key, shape, dtype) / shape[-1] ** 0.5
