"""The paper's variational autoencoder of LoRA vectors (arXiv 2412.02352, section on latents).

    z ~ N(μ, σ²),  (μ, log σ²) = encoder(whitened vector),  loss = MSE + kl_weight · KL

Encoder: LayerNorm → Linear → residual MLP blocks (width → expansion · width → width, SiLU); the
decoder mirrors it. `Latents` is the codec that lets `weight_diffusion.Diffusion` work on μ.
"""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, Float, Params
from hyperlora_jax.hypernet.weight_diffusion import Whitened
from hyperlora_jax.lora.sites import LoraSpec


class MlpStack(nn.Module):
    """`depth` residual blocks x + Linear(SiLU(Linear(LayerNorm(x))))."""

    depth: int
    expansion: int
    dtype: Any = jnp.float32

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
    dtype: Any = jnp.float32

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
    back, mean, log_variance = cast(Any, vae.apply({"params": params}, x, key))
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
        x = self.vae.apply({"params": constants["vae"]}, z, method="decode")
        return Whitened(self.spec).decode(constants, x)
