"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x and XL, NHWC, driven by its config.json.

Parameter and LoRA paths are `lora.sites.module_path` of the diffusers module paths.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hyperlora_jax.array_types import AnyArray, Array, DType, Float, Int, Json
from hyperlora_jax.lora.region_shares import Shares, pyramid
from hyperlora_jax.stable_diffusion.networks.attention import Transformer2D
from hyperlora_jax.stable_diffusion.networks.blocks import check_remat, rematerialised
from hyperlora_jax.stable_diffusion.networks.layers import (
    Conv,
    Dense,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
)
from hyperlora_jax.stable_diffusion.networks.lora_argument import check_lora
from hyperlora_jax.stable_diffusion.networks.unet_config import UNetConfig


def sinusoidal_embedding(
    positions: Float[Array, " n"], width: int, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "n width"]:
    """sin and cos of position · 10000^(-k / (width/2 - freq_shift)), cos first when flipped."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - freq_shift))
    angles = positions[:, None] * frequencies[None]
    parts = (
        (jnp.cos(angles), jnp.sin(angles))
        if flip_sin_to_cos
        else (jnp.sin(angles), jnp.cos(angles))
    )
    return jnp.concatenate(parts, axis=-1)


class EmbeddingMlp(nn.Module):
    """linear_1, SiLU, linear_2; with a guidance, a projection of it is added to the input."""

    features: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b i"], guidance: Float[Array, "b g"] | None = None
    ) -> Float[Array, "b o"]:
        """Embeds a row of numbers."""
        if guidance is not None:
            x = x + Dense(x.shape[-1], False, self.dtype, name="cond_proj")(guidance)
        hidden = jax.nn.silu(Dense(self.features, dtype=self.dtype, name="linear_1")(x))
        return Dense(self.features, dtype=self.dtype, name="linear_2")(hidden)


class UNetBlock(nn.Module):
    """A down, mid or up block: resnets, each followed by a transformer where there are `depths`."""

    config: UNetConfig
    features: int
    num_resnets: int
    depths: tuple[int, ...]  # blocks of each transformer; () without any
    num_heads: int
    resample: str | None = None  # "down", "up"
    dtype: DType = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    mesh: Mesh | None = None
    scan: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, "bk t"],
        context: Float[Array, "bk n e"],
        skips: tuple[Array, ...],
        size: tuple[int, int] | None,
        regions: Shares | None,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Returns the block's output and, for a down block, all its skip connections.

        `skips` are concatenated from the last to the first; `size` is what an up block resizes to.
        """
        outputs = []
        for i in range(self.num_resnets):
            if skips:
                x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            x = self._resnet(i)(x, time, regions)
            if i < len(self.depths):
                x = self._transformer(i)(x, context, regions)
            outputs.append(x)
        if self.resample == "down":
            x = Downsample(dtype=self.dtype, name="downsamplers_0")(x, regions)
            outputs.append(x)
        elif self.resample == "up":
            x = Upsample(dtype=self.dtype, name="upsamplers_0")(x, size, regions)
        return x, tuple(outputs)

    def _resnet(self, i: int) -> ResnetBlock:
        c = self.config
        block_class = rematerialised(ResnetBlock, self.remat)
        return block_class(self.features, c.num_groups, c.epsilon, self.dtype, name=f"resnets_{i}")

    def _transformer(self, i: int) -> Transformer2D:
        c = self.config
        return Transformer2D(
            self.num_heads,
            self.depths[i],
            c.num_groups,
            c.use_linear_projection,
            self.dtype,
            self.attention,
            self.remat,
            self.mesh,
            self.scan,
            name=f"attentions_{i}",
        )


class UNet(nn.Module):
    """Noise (or velocity) predictor. Apply with {"params": P} or {"params": P, "lora": L}.

    `attention` is one of attention_kernels.IMPLEMENTATIONS, `remat` one of
    rematerialisation.REMAT_POLICIES; `mesh` is needed by splash attention on several devices only.
    `scan` runs equal transformer blocks in a loop (see `equal_blocks`), which SDXL compiles faster.
    `apart` keeps the self-attention, group norms and convolutions of regions within them.
    `unet.clone(remat="block")` gives the same UNet with another policy.
    """

    settings: UNetConfig
    dtype: DType = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    mesh: Mesh | None = None
    scan: bool = False
    apart: bool = False

    @property
    def config(self) -> dict[str, object]:
        """The config.json it was made from."""
        return self.settings.config

    @nn.compact
    def __call__(
        self,
        latents: Float[AnyArray, "b h w z"],
        timesteps: Int[AnyArray, " b"] | Float[AnyArray, " b"],
        text_states: Float[AnyArray, "bk n e"],
        added_cond_kwargs: Mapping[str, AnyArray] | None = None,
        masks: Float[AnyArray, "b k h w"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """Prediction for noisy latents; `added_cond_kwargs` = {text_embeds, time_ids} for SDXL, and
        {timestep_cond: [b, guidance_width]} for one distilled with its guidance (default zeros).

        With the `masks` of k regions, which add up to 1 at every position, text, added conditions
        and LoRAs have k rows for each picture, region by region."""
        c, regions = self.settings, None
        check_remat(self.remat)
        if masks is not None:
            regions = pyramid(jnp.asarray(masks, self.dtype), c.num_levels, self.apart)
            timesteps = jnp.repeat(jnp.asarray(timesteps), masks.shape[1])
        if "lora" in self.variables:
            check_lora(self.variables["lora"], self.variables["params"], timesteps.shape[0])
        time = self._time(jnp.asarray(timesteps), added_cond_kwargs)
        context = jnp.asarray(text_states, self.dtype)
        x = Conv(c.channels[0], dtype=self.dtype, name="conv_in")(jnp.asarray(latents), regions)
        skips = [x]
        for i in range(c.num_levels):
            last = i == c.num_levels - 1
            block = self._block(f"down_blocks_{i}", i, c.layers[i], None if last else "down")
            x, outputs = block(x, time, context, (), None, regions)
            skips.extend(outputs)
        x = self._mid(x, time, context, regions)
        for i in range(c.num_levels):
            taken = skips[-c.layers[c.num_levels - 1 - i] - 1 :]
            del skips[-len(taken) :]
            size = skips[-1].shape[1:3] if skips else None
            x = self._up(i)(x, time, context, tuple(taken), size, regions)[0]
        norm = GroupNorm(c.num_groups, c.epsilon, self.dtype, name="conv_norm_out")
        x = jax.nn.silu(norm(x, regions))
        return Conv(c.out_channels, dtype=self.dtype, name="conv_out")(x, regions)

    def _time(self, timesteps: Array, added: Mapping[str, Array] | None) -> Array:
        c = self.settings
        sinusoids = sinusoidal_embedding(
            timesteps.astype(jnp.float32), c.channels[0], c.flip_sin_to_cos, c.freq_shift
        )
        guidance = (added or {}).get("timestep_cond")
        if guidance is None and c.guidance_width:
            guidance = jnp.zeros((timesteps.shape[0], c.guidance_width))
        time = EmbeddingMlp(c.time_width, self.dtype, name="time_embedding")(sinusoids, guidance)
        if c.addition_time_width is None:
            return time
        if added is None or not {"text_embeds", "time_ids"} <= set(added):
            raise ValueError(
                "this UNet (addition_embed_type text_time) needs added_cond_kwargs with "
                f"text_embeds and time_ids, got {sorted(added or ())}"
            )
        ids = added["time_ids"].astype(jnp.float32)
        embedded = sinusoidal_embedding(
            ids.reshape(-1), c.addition_time_width, c.flip_sin_to_cos, c.freq_shift
        )
        embedded = embedded.reshape(ids.shape[0], -1)
        joined = jnp.concatenate([added["text_embeds"].astype(jnp.float32), embedded], axis=-1)
        return time + EmbeddingMlp(c.time_width, self.dtype, name="add_embedding")(joined)

    def _block(self, name: str, level: int, num_resnets: int, resample: str | None) -> UNetBlock:
        c = self.settings
        up_index = c.num_levels - 1 - level
        if name.startswith("up"):
            depths = c.up_depths[up_index] if c.up_attention[up_index] else ()
        else:
            depths = c.depths[level] if c.down_attention[level] else ()
        return self._make(name, level, num_resnets, depths, resample)

    def _make(
        self, name: str, level: int, num_resnets: int, depths: tuple[int, ...], resample: str | None
    ) -> UNetBlock:
        c = self.settings
        block_class = nn.remat(UNetBlock, static_argnums=5) if self.remat == "full" else UNetBlock
        return block_class(
            c,
            c.channels[level],
            num_resnets,
            depths,
            c.num_heads[level],
            resample,
            self.dtype,
            self.attention,
            self.remat,
            self.mesh,
            self.scan,
            name=name,
        )

    def _mid(self, x: Array, time: Array, context: Array, regions: Shares | None) -> Array:
        c = self.settings
        if c.mid_block is None:
            return x
        attends = c.mid_block == "UNetMidBlock2DCrossAttn"
        num_resnets, depths = (2, c.depths[-1][:1]) if attends else (1, ())
        block = self._make("mid_block", c.num_levels - 1, num_resnets, depths, None)
        return block(x, time, context, (), None, regions)[0]

    def _up(self, i: int) -> UNetBlock:
        level = self.settings.num_levels - 1 - i
        num_resnets = self.settings.layers[level] + 1
        return self._block(f"up_blocks_{i}", level, num_resnets, "up" if level else None)

    def dummy_inputs(self) -> tuple:
        """Zero inputs of batch 1, enough to initialise or trace."""
        c = self.settings
        size = 2 ** (c.num_levels - 1)
        added = None
        if c.addition_time_width is not None:
            pooled = (c.addition_input_width or 0) - 6 * c.addition_time_width
            added = {"text_embeds": jnp.zeros((1, pooled)), "time_ids": jnp.zeros((1, 6))}
        return (
            jnp.zeros((1, size, size, c.in_channels)),
            jnp.zeros((1,)),
            jnp.zeros((1, 1, c.context_width)),
            added,
        )


def unet_from_config(config: Json, dtype: DType = jnp.float32) -> UNet:
    """UNet of a diffusers config.json. Raises UserError naming what it does not support."""
    return UNet(UNetConfig.from_dict(config), dtype)
