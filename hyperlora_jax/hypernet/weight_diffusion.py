"""Diffusion over LoRAs: the weights are the data, the reference is the prompt.

    x0 = codec.encode(LoRA),  x_t = process(x0, noise, t),  prediction = denoiser(x_t, t, condition)

The codec says in which space: whitened factors here (`Whitened`), or latents of the paper's VAE
(`Latents`). The denoiser is the token transformer (`TokenDenoiser`) or the paper's MLP
(`mlp_denoiser.py`). Training gives the mean squared error of the prediction, and the LoRA of the
one-step estimate of x0, on which other losses (denoising through the base) may be put.

The paper's variational autoencoder of LoRA vectors (arXiv 2412.02352, section on latents).

    z ~ N(μ, σ²),  (μ, log σ²) = encoder(whitened vector),  loss = MSE + kl_weight · KL

Encoder: LayerNorm → Linear → residual MLP blocks (width → expansion · width → width, SiLU); the
decoder mirrors it. `Latents` lets `Diffusion` work on μ.
"""

import dataclasses
from typing import Any, Protocol, cast, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, DType, Float, Params
from hyperlora_jax.diffusion.processes import Process
from hyperlora_jax.hypernet.condition import Condition, dropped
from hyperlora_jax.hypernet.generators import Draw, Estimate, guided
from hyperlora_jax.hypernet.token_network import TokenHypernetwork
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSpec


@runtime_checkable
class Codec(Protocol):
    """Flat LoRA vectors ⇄ data of unit variance that diffusion works on; reads `constants`."""

    @property
    def spec(self) -> LoraSpec:
        """Of the LoRAs."""
        ...

    @property
    def size(self) -> int:
        """Numbers z of the data."""
        ...

    def encode(self, constants: Params, vectors: Float[Array, "l d"]) -> Float[Array, "l z"]:
        """LoRA vectors → data."""
        ...

    def decode(self, constants: Params, data: Float[Array, "l z"]) -> Float[Array, "l d"]:
        """Data → LoRA vectors."""
        ...


@dataclasses.dataclass(frozen=True)
class Whitened:
    """(vector - mean) / spread, the spread one number per factor; constants "mean" and "std"."""

    spec: LoraSpec

    @property
    def size(self) -> int:
        """See `Codec`."""
        return self.spec.num_parameters

    def encode(self, constants: Params, vectors: Array) -> Array:
        """See `Codec`."""
        spread = vectorize.element_spread(constants["std"], self.spec)
        return (vectors - constants["mean"]) / spread

    def decode(self, constants: Params, data: Array) -> Array:
        """See `Codec`."""
        spread = vectorize.element_spread(constants["std"], self.spec)
        return data * spread + constants["mean"]


class TokenDenoiser(nn.Module):
    """The token transformer as a function of flat vectors; its network reads noise and writes
    whitened numbers."""

    net: TokenHypernetwork

    @nn.compact
    def __call__(
        self, x: Float[Array, "l d"], time: Float[Array, " l"], condition: Condition
    ) -> Float[Array, "l d"]:
        """What the process asks for, at x and time."""
        spec = self.net.layout.spec
        written = self.net(condition, vectorize.unflatten(x, spec), time)
        return vectorize.flatten(written, spec)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """See the head of this file.

    Attributes:
        codec: the space.
        denoiser: Linen module (x_t [l, z], time [l], condition) → prediction [l, z].
        process: what is predicted, and how noise comes and goes.
        condition_dropout: share of subjects that training makes unknown; guidance needs it.
    """

    codec: Codec
    denoiser: Any
    process: Process
    condition_dropout: float = 0.1

    stochastic = True
    needs_targets = True

    @property
    def spec(self) -> LoraSpec:
        """See `Generator`."""
        return self.codec.spec

    def init(self, key: Array, condition: Condition) -> Params:
        """See `Generator`."""
        count = len(condition.pooled)
        x = jnp.zeros((count, self.codec.size))
        return self.denoiser.init(key, x, jnp.zeros(count), condition)["params"]

    def train(
        self,
        params: Params,
        constants: Params,
        condition: Condition,
        target: Float[Array, "l d"] | None,
        key: Array,
    ) -> Estimate:
        """See `Generator`: the loss "diffusion", and the LoRA of the one-step estimate."""
        if target is None:
            raise ValueError("diffusion over weights needs target LoRAs, got None")
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        x0 = self.codec.encode(constants, target)
        noise = jax.random.normal(noise_key, x0.shape)
        time = self.process.draw_times(time_key, len(x0))
        x_t = self.process.add_noise(x0, noise, time)
        condition = dropped(condition, self.condition_dropout, drop_key)
        prediction = self.denoiser.apply({"params": params}, x_t, time, condition)
        error = prediction - self.process.target(x0, noise, time)
        estimate = self.codec.decode(constants, self.process.to_x0(prediction, x_t, time))
        lora = vectorize.unflatten(estimate, self.spec)
        return Estimate(lora, {"diffusion": jnp.mean(jnp.square(error), axis=1)})

    def sample(
        self, params: Params, constants: Params, condition: Condition, key: Array, draw: Draw
    ) -> Params:
        """See `Generator`."""
        noise_key, step_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (len(condition.pooled), self.codec.size))

        def denoise(x: Array, time: Array) -> Array:
            def predict(given: Condition) -> Array:
                repeats = len(given.pooled) // len(x)
                states, times = jnp.tile(x, (repeats, 1)), jnp.tile(time, repeats)
                return self.denoiser.apply({"params": params}, states, times, given)

            return guided(predict, condition, draw.guidance, self.condition_dropout)

        data = self.process.sample(denoise, noise, draw.num_steps, draw.sampler, step_key)
        return vectorize.unflatten(self.codec.decode(constants, data), self.spec)


class MlpStack(nn.Module):
    """`depth` residual blocks x + Linear(SiLU(Linear(LayerNorm(x))))."""

    depth: int
    expansion: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "l c"]) -> Float[Array, "l c"]:
        """All blocks."""
        width = x.shape[-1]
        for k in range(self.depth):
            hidden = nn.LayerNorm(dtype=self.dtype, name=f"norm_{k}")(x)
            hidden = nn.Dense(self.expansion * width, dtype=self.dtype, name=f"in_{k}")(hidden)
            x = x + nn.Dense(width, dtype=self.dtype, name=f"out_{k}")(nn.silu(hidden))
        return x


class WeightVae(nn.Module):
    """See the head of this file.

    Attributes:
        size: numbers d of a vector.
        latent_dim: m, numbers of a latent.
    """

    size: int
    latent_dim: int = 512
    width: int = 512
    depth: int = 20
    expansion: int = 3
    dtype: DType = jnp.float32

    def setup(self):
        """Encoder and decoder, so that either can be used alone."""
        self.norm_in = nn.LayerNorm(dtype=self.dtype)
        self.enter = nn.Dense(self.width, dtype=self.dtype)
        self.encoder = MlpStack(self.depth, self.expansion, self.dtype)
        self.moments = nn.Dense(2 * self.latent_dim, dtype=self.dtype)
        self.open = nn.Dense(self.width, dtype=self.dtype)
        self.decoder = MlpStack(self.depth, self.expansion, self.dtype)
        self.leave = nn.Dense(self.size, dtype=self.dtype)

    def encode(self, x: Float[Array, "l d"]) -> tuple[Float[Array, "l m"], Float[Array, "l m"]]:
        """Whitened vectors → (μ, log σ²)."""
        moments = self.moments(self.encoder(self.enter(self.norm_in(x))))
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, -20.0, 10.0)

    def decode(self, z: Float[Array, "l m"]) -> Float[Array, "l d"]:
        """Latents → whitened vectors."""
        return self.leave(self.decoder(self.open(z))).astype(jnp.float32)

    def __call__(
        self, x: Float[Array, "l d"], key: Array
    ) -> tuple[Float[Array, "l d"], Float[Array, "l m"], Float[Array, "l m"]]:
        """(reconstruction of a sampled latent, μ, log σ²)."""
        mean, log_variance = self.encode(x)
        noise = jax.random.normal(key, mean.shape)
        return self.decode(mean + jnp.exp(0.5 * log_variance) * noise), mean, log_variance


def vae_losses(
    vae: WeightVae, params: Params, x: Float[Array, "l d"], key: Array
) -> dict[str, Float[Array, " l"]]:
    """ "reconstruction": mean squared error; "kl": mean over latents of KL(N(μ, σ²) ‖ N(0, 1))."""
    back, mean, log_variance = cast(
        tuple[Array, Array, Array], vae.apply({"params": params}, x, key)
    )
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
    return {
        "reconstruction": jnp.mean(jnp.square(back - x), axis=1),
        "kl": jnp.mean(divergence, axis=1),
    }


@dataclasses.dataclass(frozen=True)
class Latents:
    """μ of the VAE, each number scaled to unit variance.

    Constants: those of `Whitened`, "vae" (its parameters), "latent_mean" and "latent_std" [m].
    """

    spec: LoraSpec
    vae: WeightVae

    @property
    def size(self) -> int:
        """See `Codec`."""
        return self.vae.latent_dim

    def raw_latents(self, constants: Params, vectors: Float[Array, "l d"]) -> Float[Array, "l m"]:
        """μ before scaling: what "latent_mean" and "latent_std" are statistics of."""
        x = Whitened(self.spec).encode(constants, vectors)
        mean, _ = self.vae.apply({"params": constants["vae"]}, x, method="encode")
        return mean

    def encode(self, constants: Params, vectors: Array) -> Array:
        """See `Codec`."""
        raw = self.raw_latents(constants, vectors)
        return (raw - constants["latent_mean"]) / constants["latent_std"]

    def decode(self, constants: Params, data: Array) -> Array:
        """See `Codec`."""
        z = data * constants["latent_std"] + constants["latent_mean"]
        x = cast(Array, self.vae.apply({"params": constants["vae"]}, z, method="decode"))
        return Whitened(self.spec).decode(constants, x)
