"""Training the hypernetwork: weight-space losses against target LoRAs, the denoising loss through
the frozen base with every subject's own LoRA, or any mix of both.

A batch holds l subjects (`batches/pipelines.subject_batches`):

    pooled [l, k, e], tokens [l, k, m, e]     condition embeddings of k reference pictures
    reference_mask [l, k]                     which of them are given
    latents [l, g, h, w, c], text [l, g, …]   g pictures of the same subject and their captions
    target [l, d]                             factors, where a dataset has them
    step [l]                                  number of the batch: says which phase it belongs to

Phases are mixtures of objectives, one after the other: a few steps in weight space, say, and then
end to end.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, ArrayTree, Float, Json, Params
from hyperlora_jax.hypernet.condition import Condition, merge_references
from hyperlora_jax.hypernet.generators import Estimate, Generator
from hyperlora_jax.lora import vectorize
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser
from hyperlora_jax.train.flop_count import flops
from hyperlora_jax.train.hypernetwork import objectives
from hyperlora_jax.train.hypernetwork.objectives import ObjectiveWeights
from hyperlora_jax.train.loop import Batches, Task

Parts = dict[str, Float[Array, " l"]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Objectives up to step `until` (None: to the end)."""

    weights: ObjectiveWeights
    until: int | None = None


def hypernet_loss(
    params: Params,
    frozen: Params,
    batch: Params,
    key: Array,
    *,
    generator: Generator,
    phases: Sequence[Phase],
    base: Denoiser | None,
) -> tuple[Float[Array, " l"], Parts]:
    """Weighted sum of the objectives [l], and each of them by name."""
    draw_key, base_key, prior_key = jax.random.split(key, 3)
    estimate, target = _estimate(params, frozen, batch, draw_key, generator)

    def parts_of(weights: ObjectiveWeights) -> Parts:
        return _parts(
            weights, estimate, target, frozen, batch, base, (base_key, prior_key), generator
        )

    names = [f.name for f in dataclasses.fields(ObjectiveWeights)]
    used = [n for n in names if any(getattr(phase.weights, n) for phase in phases)]
    zeros = jnp.zeros(len(batch["pooled"]))

    def branch(weights: ObjectiveWeights) -> tuple[Float[Array, " l"], Parts]:
        parts = parts_of(weights)
        total = sum((getattr(weights, name) * value for name, value in parts.items()), zeros)
        return total, {name: parts.get(name, zeros) for name in used}

    if len(phases) == 1:
        return branch(phases[0].weights)
    step = jnp.min(batch["step"])
    bounds = jnp.asarray([phase.until for phase in phases[:-1]])
    number = jnp.sum(step >= bounds)
    return jax.lax.switch(number, [functools.partial(branch, phase.weights) for phase in phases])


def _estimate(
    params: Params, frozen: Params, batch: Params, key: Array, generator: Generator
) -> tuple[Estimate, Float[Array, "l d"] | None]:
    """The generator's training pass, and the target LoRAs if the batch has any."""
    condition = merge_references(
        batch["pooled"].astype(jnp.float32),
        batch["tokens"].astype(jnp.float32),
        batch.get("reference_mask"),
    )
    target = batch["target"].astype(jnp.float32) if "target" in batch else None
    constants = frozen.get("constants", {})
    return generator.train(params, constants, condition, target, key), target


def model_flops(
    params: Params,
    frozen: Params,
    batch: Params,
    key: Array,
    *,
    generator: Generator,
    phases: Sequence[Phase],
    base: Denoiser | None,
) -> float:
    """Model FLOPs of training on a batch: the generator's forward pass three times, everything
    else twice, as the frozen base needs no gradients of its weights. Rematerialisation does not
    count. Of several phases the dearest counts."""

    def own(*arguments: ArrayTree) -> ArrayTree:
        estimate, _ = _estimate(*arguments, generator=generator)
        return estimate.lora, estimate.losses

    loss = functools.partial(hypernet_loss, generator=generator, phases=phases, base=base)
    generating = flops(own, params, frozen, batch, key)
    return generating + 2.0 * flops(loss, params, frozen, batch, key)


def _parts(
    weights: ObjectiveWeights,
    estimate: Estimate,
    target: Array | None,
    frozen: Params,
    batch: Params,
    base: Denoiser | None,
    keys: tuple[Array, Array],
    generator: Generator,
) -> Parts:
    spec, spread, wanted = generator.spec, None, None
    if weights.need_targets:
        assert target is not None
        wanted = vectorize.unflatten(target, spec)
    if weights.whitened:
        spread = vectorize.spread_tree(frozen["constants"]["std"], spec)
    parts = objectives.weight_losses(weights, estimate.lora, wanted, spread)
    parts |= {name: loss for name, loss in estimate.losses.items() if getattr(weights, name)}
    if weights.end_to_end:
        assert base is not None
        parts["end_to_end"] = objectives.end_to_end_loss(
            base, frozen["unet"], estimate.lora, batch["latents"], batch["text"], keys[0]
        )
    if weights.prior:
        assert base is not None
        parts["prior"] = objectives.prior_loss(
            base, frozen["unet"], estimate.lora, batch["latents"], frozen["prior_text"], keys[1]
        )
    return parts


def hypernet_task(
    generator: Generator,
    frozen: Params,
    batches: Batches,
    *,
    phases: Sequence[Phase],
    condition_shapes: tuple[tuple[int, ...], tuple[int, ...]],
    base: Denoiser | None = None,
    facts: Json | None = None,
    num_images: int = 0,
) -> Task:
    """The task of the ordinary training loop.

    Args:
        frozen: {"unet": parameters, "prior_text": one row of `text`, "constants": the generator's},
            each only if a loss needs it.
        batches: as described in this file's head.
        phases: one after the other; all but the last have an end.
        base: whose parameters are in `frozen`.
        condition_shapes: shapes of one subject's (pooled, tokens), ([e], [m, e]).
        num_images: of a subject that the base sees in a step, for images/s.
    """
    pooled_shape, tokens_shape = condition_shapes

    def init(key: Array) -> Params:
        condition = Condition(jnp.zeros((1, *pooled_shape)), jnp.zeros((1, *tokens_shape)))
        return generator.init(key, condition)

    parts = {"generator": generator, "phases": tuple(phases), "base": base}
    images = {"images": num_images} if num_images else {}
    return Task(
        name="hypernetwork",
        init=init,
        loss=functools.partial(hypernet_loss, **parts),
        frozen=frozen,
        batches=batches,
        facts=facts or {},
        units={"loras": 1, **images},
        model_flops=functools.partial(model_flops, **parts),
    )
