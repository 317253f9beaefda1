"""Training the hypernetwork: weight-space losses against target LoRAs, the denoising loss through
the frozen base with every subject's own LoRA, or any mix of both.

A batch holds l subjects (`data/pipelines.subject_batches`):

    pooled [l, k, e], tokens [l, k, m, e]     condition embeddings of k reference pictures
    latents [l, g, h, w, c], text_index [l, g]            g pictures of the same subject
    target [l, d]                             folded raw factors, where a dataset has them
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, Float, Params
from hyperlora_jax.hypernet.hypernetwork import TokenHypernetwork
from hyperlora_jax.hypernet.objectives import ObjectiveWeights, end_to_end_loss, weight_losses
from hyperlora_jax.lora import vectorize
from hyperlora_jax.train.loop import Task


def merge_references(
    pooled: Float[Array, "l k e"], tokens: Float[Array, "l k m e"]
) -> tuple[Float[Array, "l e"], Float[Array, "l t e"]]:
    """Several references of a subject as one condition: mean of the pooled, all of the tokens."""
    merged = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
    return jnp.mean(pooled, axis=1), merged


def hypernet_loss(
    params: Params,
    frozen: Params,
    batch: dict[str, Array],
    key: Array,
    *,
    net: TokenHypernetwork,
    weights: ObjectiveWeights,
    unet: Any,
    schedule: Any,
    min_snr_gamma: float | None,
) -> tuple[Float[Array, " l"], dict[str, Float[Array, " l"]]]:
    """Weighted sum of the objectives [l], and each of them by name."""
    pooled, tokens = merge_references(
        batch["pooled"].astype(jnp.float32), batch["tokens"].astype(jnp.float32)
    )
    lora = net.apply({"params": params}, pooled, tokens)
    target = None
    if "target" in batch:
        target = vectorize.unflatten(batch["target"].astype(jnp.float32), net.layout.spec)
    parts = weight_losses(weights, lora, target, frozen.get("whitening"))
    if weights.end_to_end:
        parts["end_to_end"] = end_to_end_loss(
            unet,
            frozen["unet"],
            schedule,
            lora,
            batch["latents"],
            frozen["text_states"][batch["text_index"]],
            key,
            min_snr_gamma,
        )
    total = sum(getattr(weights, name) * value for name, value in parts.items())
    return total, parts


def hypernet_task(
    net: TokenHypernetwork,
    frozen: Params,
    batches: Any,
    *,
    weights: ObjectiveWeights,
    condition_shapes: tuple[tuple[int, ...], tuple[int, ...]],
    unet: Any = None,
    schedule: Any = None,
    min_snr_gamma: float | None = None,
    facts: dict[str, Any] | None = None,
) -> Task:
    """The task of the ordinary training loop.

    Args:
        frozen: {"unet": parameters, "text_states": [u, n, e] of all captions, "whitening":
            statistics}, each only if a loss needs it.
        batches: as described in this file's head.
        condition_shapes: shapes of one subject's (pooled, tokens), ([e], [m, e]).
    """
    pooled_shape, tokens_shape = condition_shapes

    def init(key: Array) -> Params:
        pooled, tokens = jnp.zeros((1, *pooled_shape)), jnp.zeros((1, *tokens_shape))
        return net.init(key, pooled, tokens)["params"]

    loss = functools.partial(
        hypernet_loss,
        net=net,
        weights=weights,
        unet=unet,
        schedule=schedule,
        min_snr_gamma=min_snr_gamma,
    )
    return Task(
        name="hypernetwork",
        init=init,
        loss=loss,
        frozen=frozen,
        batches=batches,
        facts=facts or {},
    )


def num_parameters(params: Params) -> int:
    """Trainable numbers."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
