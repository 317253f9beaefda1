"""The paper's denoiser of LoRA vectors or latents (arXiv 2412.02352): a U-Net made of MLPs.

    LayerNorm → Linear → stages of residual blocks, each half as wide → mirrored, with skips

Time enters every block by AdaNorm. So does the condition (`conditioning="adanorm"`), or it
writes a low-rank map between the two linears of every block (`"adalora"`).
"""

import flax.linen as nn
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, DType, Float
from hyperlora_jax.hypernet.backbone import CONDITIONINGS, AdaLora, timestep_features
from hyperlora_jax.hypernet.condition import Condition


class ResidualBlock(nn.Module):
    """x + Linear(AdaLoRA?(SiLU(Linear(AdaNorm(x)))))."""

    expansion: int = 2
    conditioning: str = "adanorm"
    adapter_rank: int = 8
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "l c"], time: Float[Array, "l t"], told: Float[Array, "l t"]
    ) -> Float[Array, "l c"]:
        """One block; `time` and `told` embed time and condition at one width."""
        width = x.shape[-1]
        adalora = self.conditioning == "adalora"
        zeros = nn.initializers.zeros
        modulation = nn.Dense(2 * width, dtype=self.dtype, kernel_init=zeros, name="modulation")
        parts = modulation(nn.silu(time if adalora else time + told))
        shift, scale = jnp.split(parts, 2, axis=-1)
        norm = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)
        hidden = norm(x) * (1 + scale) + shift
        hidden = nn.Dense(self.expansion * width, dtype=self.dtype, name="in")(hidden)
        hidden = nn.silu(hidden)
        if adalora:
            adapter = AdaLora(self.adapter_rank, self.dtype, name="adalora")
            hidden = adapter(hidden[:, None], told)[:, 0]
        return x + nn.Dense(width, dtype=self.dtype, name="out")(hidden)


class MlpDenoiser(nn.Module):
    """See the head of this file.

    Attributes:
        size: numbers of the data.
        width: of the first stage; every further stage has half.
    """

    size: int
    width: int = 1024
    num_stages: int = 4
    blocks_per_stage: int = 3
    expansion: int = 2
    conditioning: str = "adanorm"
    adapter_rank: int = 8
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "l z"], time: Float[Array, " l"], condition: Condition
    ) -> Float[Array, "l z"]:
        """Prediction at x and time, for the pooled condition."""
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"Got: {self.conditioning=}, expected one of {CONDITIONINGS}")
        widths = [max(8, self.width // 2**stage) for stage in range(self.num_stages)]
        features = nn.Dense(self.width, name="time_in")(timestep_features(time, self.width))
        moment = nn.Dense(self.width, name="time_out")(nn.silu(features))
        told = nn.Dense(self.width, name="condition_in")(condition.pooled)
        told = nn.Dense(self.width, name="condition_out")(nn.silu(told))

        def blocks(x: Array, name: str) -> Array:
            for k in range(self.blocks_per_stage):
                block = ResidualBlock(
                    self.expansion,
                    self.conditioning,
                    self.adapter_rank,
                    self.dtype,
                    name=f"{name}_{k}",
                )
                x = block(x, moment, told)
            return x

        x = nn.LayerNorm(dtype=self.dtype, name="norm_in")(x)
        x = nn.Dense(widths[0], dtype=self.dtype, name="in")(x)
        skips = []
        for stage, width in enumerate(widths):
            if stage:
                x = nn.Dense(width, dtype=self.dtype, name=f"down_{stage}")(x)
            x = blocks(x, f"encode_{stage}")
            skips.append(x)
        for stage, width in reversed(list(enumerate(widths))):
            joined = jnp.concatenate([x, skips.pop()], axis=-1)
            x = nn.Dense(width, dtype=self.dtype, name=f"up_{stage}")(joined)
            x = blocks(x, f"decode_{stage}")
        x = nn.LayerNorm(dtype=self.dtype, name="norm_out")(x)
        zeros = nn.initializers.zeros
        out = nn.Dense(self.size, dtype=self.dtype, kernel_init=zeros, name="out")(x)
        return out.astype(jnp.float32)
