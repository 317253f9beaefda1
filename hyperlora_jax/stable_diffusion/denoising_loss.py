"""The denoising loss of Stable Diffusion, per example.

    L(x0) = w_t mean((model(a_t x0 + s_t eps, t, text) - target)²)

w_t = 1, or the min-SNR weight of Hang et al. 2023 (equation 4 and its v-prediction form).

Training LoRAs of a small UNet on a CPU is bound by memory: what a batch keeps for its gradient is
many times the cache. `lora_losses` therefore computes a few pictures' losses and gradients at a
time there, and keeps the LoRAs' gradients alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Array, ArrayTree, Float, Int, Params, PRNGKey
from hyperlora_jax.diffusion.schedule import NoiseSchedule, add_noise, target
from hyperlora_jax.stable_diffusion.networks.unet import UNet
from hyperlora_jax.stable_diffusion.prompt_embeddings import Text, apply_unet


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A UNet without its parameters, its noise, and what weighs a timestep; hashable."""

    unet: UNet
    schedule: NoiseSchedule
    min_snr_gamma: float | None = None


def denoising_loss(
    denoiser: Denoiser,
    params: Params,
    latents: Float[AnyArray, "b h w z"],
    text: Text,
    key: PRNGKey,
    lora: Params | None = None,
) -> Float[Array, " b"]:
    """Loss of every example at a timestep and noise drawn from `key`.

    `latents` are scaled, `text` has b rows (`prompt_embeddings`); L LoRAs serve the b examples,
    example k uses LoRA k // (b / L).
    """
    timesteps, noise = draw_noise(denoiser, latents, key)
    return denoising_error(denoiser, params, latents, text, timesteps, noise, lora)


def draw_noise(
    denoiser: Denoiser, latents: Float[AnyArray, "*b h w z"], key: PRNGKey
) -> tuple[Int[Array, "*b"], Float[Array, "*b h w z"]]:
    """A timestep and noise for every example."""
    time_key, noise_key = jax.random.split(key)
    last = denoiser.schedule.num_train_timesteps
    timesteps = jax.random.randint(time_key, latents.shape[:-3], 0, last)
    return timesteps, jax.random.normal(noise_key, latents.shape)


def denoising_error(
    denoiser: Denoiser,
    params: Params,
    latents: Float[AnyArray, "b h w z"],
    text: Text,
    timesteps: Int[AnyArray, " b"],
    noise: Float[AnyArray, "b h w z"],
    lora: Params | None = None,
) -> Float[Array, " b"]:
    """`denoising_loss` at given timesteps and noise."""
    schedule, gamma = denoiser.schedule, denoiser.min_snr_gamma
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    latents = jnp.asarray(latents, jnp.float32)
    noisy = add_noise(schedule, latents, noise, timesteps)
    prediction = apply_unet(denoiser.unet, variables, noisy, timesteps, text)
    error = prediction.astype(jnp.float32) - target(schedule, latents, noise, timesteps)
    losses = jnp.square(error).mean((1, 2, 3))
    return losses if gamma is None else losses * min_snr_weight(schedule, timesteps, gamma)


Pictures = tuple[
    Float[AnyArray, "l g h w z"], Text, Int[AnyArray, "l g"], Float[AnyArray, "l g h w z"]
]
NUMBERS_AT_ONCE = 2**14  # of the UNet's first level that a core's cache holds with all that follows


def lora_losses(
    denoiser: Denoiser,
    params: Params,
    lora: Params,
    pictures: Pictures,
    weights: Float[AnyArray, " g"],
) -> tuple[Float[Array, " l"], Float[Array, "l g"]]:
    """Weighted sum of `denoising_error` over the g pictures of every LoRA, and its summands.

    The gradient of the sums goes to `lora` alone: the base is frozen.

    Args:
        pictures: latents, text with rows [l, g], timesteps and noise.
    """
    copies, parts = _split_by(denoiser.unet, *pictures[0].shape[:-1])
    shape = pictures[0].shape[:2]
    weights = jnp.broadcast_to(jnp.asarray(weights), shape)
    if copies > 1:
        lora = _copied(lora, copies)
        pictures, weights = _regrouped(pictures, copies), _regrouped(weights, copies)

    def added() -> tuple[Array, Array]:
        if parts == (1, 1):
            return _sums(denoiser, params, lora, pictures, weights)
        return _sums_in_parts(denoiser, parts, params, lora, pictures, weights)

    sums, errors = added()
    return (sums.sum(0, keepdims=True), errors.reshape(shape)) if copies > 1 else (sums, errors)


def _split_by(
    unet: UNet, num_loras: int, num_pictures: int, *size: int
) -> tuple[int, tuple[int, int]]:
    """On how many devices a single LoRA is copied, and how many parts of the LoRAs, or of a
    LoRA's pictures, are computed one after another.

    Every part has rows for all devices: they may be spread over them.
    """
    devices = jax.device_count()
    if jax.default_backend() != "cpu":
        return 1, (1, 1)
    copies = devices if num_loras == 1 and num_pictures % devices == 0 else 1
    numbers = math.prod(size) * unet.settings.channels[0]
    if numbers > NUMBERS_AT_ONCE:
        return copies, (1, 1)
    most = num_loras * num_pictures // (NUMBERS_AT_ONCE // numbers * devices)

    def divisor(count: int) -> int:
        return max((n for n in range(1, min(most, count) + 1) if count % n == 0), default=1)

    of_device = (num_pictures if num_loras == 1 else num_loras) / devices
    number = divisor(int(of_device)) if of_device.is_integer() else 1
    return copies, ((1, number) if num_loras == 1 else (number, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copied(lora: Params, copies: int) -> Params:
    """One LoRA as so many, a device's each. Their gradients are summed as one array: a sum over
    devices waits for all of them, and a LoRA has a hundred factors."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape[1:])), lora)


def _summed(copies: int, _, gradients: Params) -> tuple[Params]:
    leaves, structure = jax.tree.flatten(gradients)
    sizes = np.cumsum([leaf[0].size for leaf in leaves])
    flat = jnp.concatenate([leaf.reshape(copies, -1) for leaf in leaves], axis=1).sum(0)
    parts = jnp.split(flat, sizes[:-1])
    shaped = [part.reshape(1, *leaf.shape[1:]) for part, leaf in zip(parts, leaves, strict=True)]
    return (structure.unflatten(shaped),)


_copied.defvjp(lambda lora, copies: (_copied(lora, copies), None), _summed)


def _regrouped(rows: ArrayTree, count: int) -> ArrayTree:
    """[1, g, ...] → [count, g / count, ...]."""
    return jax.tree.map(lambda x: jnp.reshape(x, (count, -1, *x.shape[2:])), rows)


def _sums(
    denoiser: Denoiser, params: Params, lora: Params, pictures: Pictures, weights: AnyArray
) -> tuple[Array, Array]:
    rows = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), pictures)
    latents, text, timesteps, noise = rows
    errors = denoising_error(denoiser, params, latents, text, timesteps, noise, lora)
    errors = errors.reshape(pictures[0].shape[:2])
    return (errors * weights).sum(1), errors


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums_in_parts(
    denoiser: Denoiser,
    parts: tuple[int, int],
    params: Params,
    lora: Params,
    pictures: Pictures,
    weights: AnyArray,
) -> tuple[Array, Array]:
    def one(*part: ArrayTree) -> tuple[tuple[Array, Array], None]:
        return _sums(denoiser, params, *part), None

    return _mapped(one, parts, lora, pictures, weights)[0]


def _forward(denoiser: Denoiser, parts: tuple[int, int], params: Params, *given: ArrayTree):
    def one(*part: ArrayTree) -> tuple[tuple[Array, Array], Params]:
        def total(lora: Params) -> tuple[Array, tuple[Array, Array]]:
            sums, errors = _sums(denoiser, params, lora, *part[1:])
            return sums.sum(), (sums, errors)

        gradients, found = jax.grad(total, has_aux=True)(part[0])
        return found, gradients

    return _mapped(one, parts, *given)


def _backward(denoiser: Denoiser, parts: tuple[int, int], gradients: Params, by: tuple):
    """A LoRA's gradient is that of its own sum, which `_forward` knows."""

    def scaled(leaf: Array) -> Array:
        return leaf * by[0].reshape(-1, *(1,) * (leaf.ndim - 1))

    return None, jax.tree.map(scaled, gradients), None, None


_sums_in_parts.defvjp(_forward, _backward)


def _mapped(
    one: Callable, parts: tuple[int, int], lora: Params, pictures: Pictures, weights: AnyArray
) -> tuple[tuple[Array, Array], Params]:
    """`one`(lora, pictures, weights) of a part after another, put together."""
    if parts[0] > 1:
        rows = _split((lora, pictures, weights), parts[0], 0)
        return _joined(jax.lax.map(lambda part: one(*part), rows), 0)
    rows = _split((pictures, weights), parts[1], 1)
    (sums, errors), gradients = jax.lax.map(lambda part: one(lora, *part), rows)
    summed = jax.tree.map(lambda x: x.sum(0), (sums, gradients))
    return (summed[0], _joined(errors, 1)), summed[1]


def _split(tree: ArrayTree, count: int, axis: int) -> ArrayTree:
    """Parts in a new first axis; a part takes every `count`-th row: some of every device."""

    def split(x: AnyArray) -> Array:
        shape = (*x.shape[:axis], -1, count, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.reshape(x, shape), axis + 1, 0)

    return jax.tree.map(split, tree)


def _joined(tree: ArrayTree, axis: int) -> ArrayTree:
    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, axis + 1)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return jax.tree.map(join, tree)


def min_snr_weight(
    schedule: NoiseSchedule, timesteps: Int[AnyArray, " b"], gamma: float
) -> Float[Array, " b"]:
    """min(SNR, gamma) divided by the SNR power that the prediction type already weighs with."""
    snr = schedule.snr(timesteps)
    clipped = jnp.minimum(snr, gamma)
    if schedule.prediction_type == "sample":
        return clipped
    divisor = snr if schedule.prediction_type == "epsilon" else snr + 1.0
    return clipped / divisor
