"""What a written LoRA is judged by. Every loss is per LoRA, [l]; weights come from the config.

end-to-end     denoising loss of the subject's pictures through the frozen UNet with its LoRA
delta          gauge-free ‖UD − U'D'‖² against a target LoRA (`lora/losses.py`)
whitened       error of the raw factors, per matrix and in units of the dataset's spread
diffusion      the diffusion generator's own loss (`weight_diffusion.py`)
prior          under a caption that is not about the subject, the LoRA should change nothing
l2             mean square of the up side: keeps LoRAs small where data says nothing
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Array, Float, Params
from hyperlora_jax.diffusion.schedule import add_noise
from hyperlora_jax.lora import factors, losses
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser, draw_noise, lora_losses
from hyperlora_jax.stable_diffusion.prompt_embeddings import Text, apply_unet


@dataclasses.dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the parts of the loss; a part with weight 0 is not computed."""

    end_to_end: float = 1.0
    delta: float = 0.0
    whitened: float = 0.0
    diffusion: float = 0.0
    prior: float = 0.0
    l2: float = 0.0

    def __post_init__(self):
        values = dataclasses.asdict(self)
        if min(values.values()) < 0 or max(values.values()) == 0:
            raise ValueError(f"objective weights must be >= 0 and not all 0. Got: {values}")

    @property
    def need_targets(self) -> bool:
        """Whether a part compares with target LoRAs."""
        return bool(self.delta or self.whitened)

    @property
    def need_base(self) -> bool:
        """Whether a part runs the base model."""
        return bool(self.end_to_end or self.prior)


def end_to_end_loss(
    denoiser: Denoiser,
    unet_params: Params,
    lora: Params,
    latents: Float[Array, "l g h w c"],
    text: Text,
    key: Array,
) -> Float[Array, " l"]:
    """Mean denoising loss of the g pictures of every subject, each with its subject's LoRA; `text`
    has rows [l, g]."""
    latents = latents.astype(jnp.float32)
    timesteps, noise = draw_noise(denoiser, latents, key)
    even = np.full(latents.shape[1], 1 / latents.shape[1], np.float32)
    pictures = latents, text, timesteps, noise
    return lora_losses(denoiser, unet_params, lora, pictures, even)[0]


def prior_loss(
    denoiser: Denoiser,
    unet_params: Params,
    lora: Params,
    latents: Float[Array, "l g h w c"],
    text: Text,
    key: Array,
) -> Float[Array, " l"]:
    """Mean squared difference between the predictions with and without LoRA, on noisy pictures of
    the batch's next subject under the prior caption, whose embeddings are one row of `text`."""
    unet, schedule = denoiser.unet, denoiser.schedule
    num_loras, num_images = latents.shape[:2]
    others = jnp.roll(latents.astype(jnp.float32), 1, axis=0).reshape(-1, *latents.shape[2:])
    time_key, noise_key = jax.random.split(key)
    timesteps = jax.random.randint(time_key, others.shape[:1], 0, schedule.num_train_timesteps)
    noisy = add_noise(schedule, others, jax.random.normal(noise_key, others.shape), timesteps)
    text = jax.tree.map(lambda row: jnp.broadcast_to(row, (len(others), *row.shape)), text)
    variables = {"params": unet_params}
    plain = apply_unet(unet, variables, noisy, timesteps, text)
    changed = apply_unet(unet, {**variables, "lora": lora}, noisy, timesteps, text)
    error = changed.astype(jnp.float32) - jax.lax.stop_gradient(plain.astype(jnp.float32))
    return jnp.square(error).mean(axis=(1, 2, 3)).reshape(num_loras, num_images).mean(axis=1)


def up_size(lora: Params) -> Float[Array, " l"]:
    """Mean square of all up factors."""
    pairs = jax.tree.leaves(lora, is_leaf=factors.is_site)
    squares = [jnp.sum(jnp.square(p["up"]), axis=(1, 2)) for p in pairs]
    return functools.reduce(operator.add, squares) / sum(
        p["up"].shape[1] * p["up"].shape[2] for p in pairs
    )


def weight_losses(
    weights: ObjectiveWeights, lora: Params, target: Params | None, spread: Params | None
) -> dict[str, Float[Array, " l"]]:
    """The parts that need no UNet, by name, unweighted."""
    parts = {}
    if weights.delta:
        assert target is not None
        parts["delta"] = losses.delta_error(lora, target)
    if weights.whitened:
        assert target is not None and spread is not None
        parts["whitened"] = losses.whitened_error(lora, target, spread)
    if weights.l2:
        parts["l2"] = up_size(lora)
    return parts
