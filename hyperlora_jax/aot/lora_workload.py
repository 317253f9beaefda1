"""The LoRA training step of a base model from its config alone: what distillation and end-to-end
training cost in the UNet, without a hypernetwork beside it.

Every image has a LoRA of its own, a linear map of its condition: lora_k = Σ_e condition[k, e] W[e].
W is trained, the UNet is a frozen argument.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hyperlora_jax.aot.ahead_of_time import Workload
from hyperlora_jax.array_types import Array, DType, Params
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.diffusion.scheduler_config import read_scheduler_config
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import spec_from_shapes
from hyperlora_jax.stable_diffusion.denoising_loss import denoising_loss
from hyperlora_jax.stable_diffusion.networks.blocks import stack_blocks
from hyperlora_jax.stable_diffusion.networks.unet import UNet, unet_from_config
from hyperlora_jax.stable_diffusion.weights.families import SCHEDULER
from hyperlora_jax.stable_diffusion.weights.flax_trees import param_shapes
from hyperlora_jax.train.step import Loss


def lora_loss(unet: UNet, schedule: NoiseSchedule) -> Loss:
    """The per-image denoising loss [b] as a step's loss."""

    def loss(
        params: Params, frozen: Params, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        lora = jax.tree.map(
            lambda leaf: jnp.tensordot(batch["condition"], leaf, axes=1), params["lora"]
        )
        text = {"states": batch["states"]}
        losses = denoising_loss(unet, frozen["unet"], schedule, batch["latents"], text, key, lora)
        return losses, {}

    return loss


def lora_workload(
    unet_config: Mapping[str, object],
    *,
    preset: str = "attn-qkvo",
    rank: int = 8,
    condition_width: int = 1,
    num_tokens: int = 77,
    remat: str = "none",
    attention: str = "splash",
    scan: bool = False,
    dtype: DType = jnp.bfloat16,
) -> Workload:
    """The workload of a diffusers UNet config (without an added embedding) at its sample_size.

    Latents and conditions are float32, the frozen UNet and its arithmetic `dtype`.
    """
    unet = unet_from_config(unet_config, dtype).clone(remat=remat, attention=attention, scan=scan)
    schedule = read_scheduler_config(SCHEDULER)
    shapes = param_shapes(unet)
    spec = spec_from_shapes(shapes, preset, rank)
    if scan:
        shapes = jax.eval_shape(stack_blocks, shapes)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    settings = unet.settings
    arrays = {
        "latents": (*settings.sample_size, settings.in_channels),
        "states": (num_tokens, settings.context_width),
        "condition": (condition_width,),
    }

    def on_mesh(mesh: Mesh) -> Loss:
        return lora_loss(unet.clone(mesh=mesh), schedule)

    return Workload(
        name="lora",
        init=lambda key: {"lora": factors.init(key, spec, condition_width)},
        loss=lora_loss(unet, schedule),
        loss_on=on_mesh,
        frozen={"unet": frozen},
        batch=lambda size: {
            name: jax.ShapeDtypeStruct((size, *shape), jnp.float32)
            for name, shape in arrays.items()
        },
        remat=remat,
    )
