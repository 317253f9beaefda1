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
from hyperlora_jax.array_types import Array, Params
from hyperlora_jax.diffusion.scheduler_config import read_scheduler_config
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import spec_from_shapes
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser, denoising_loss
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.families import SCHEDULER
from hyperlora_jax.stable_diffusion.weights.flax_trees import param_shapes
from hyperlora_jax.train.step import Loss

RANK, NUM_TOKENS = 8, 77


def lora_loss(denoiser: Denoiser) -> Loss:
    """The per-image denoising loss [b] as a step's loss."""

    def loss(
        params: Params, frozen: Params, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        lora = jax.tree.map(
            lambda leaf: jnp.tensordot(batch["condition"], leaf, axes=1), params["lora"]
        )
        text = {"states": batch["states"]}
        losses = denoising_loss(denoiser, frozen["unet"], batch["latents"], text, key, lora)
        return losses, {}

    return loss


def lora_workload(
    unet_config: Mapping[str, object], condition_width: int = 1, remat: str = "none"
) -> Workload:
    """The workload of a diffusers UNet config (without an added embedding) at its sample_size.

    Latents and conditions are float32, the frozen UNet and its arithmetic bfloat16.
    """
    unet = unet_from_config(unet_config, jnp.bfloat16).clone(remat=remat, attention="splash")
    schedule = read_scheduler_config(SCHEDULER)
    shapes = param_shapes(unet)
    spec = spec_from_shapes(shapes, "attn-qkvo", RANK)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    settings = unet.settings
    arrays = {
        "latents": (*settings.sample_size, settings.in_channels),
        "states": (NUM_TOKENS, settings.context_width),
        "condition": (condition_width,),
    }

    def on_mesh(mesh: Mesh) -> Loss:
        return lora_loss(Denoiser(unet.clone(mesh=mesh), schedule))

    return Workload(
        name="lora",
        init=lambda key: {"lora": factors.init(key, spec, condition_width)},
        loss=lora_loss(Denoiser(unet, schedule)),
        loss_on=on_mesh,
        frozen={"unet": frozen},
        batch=lambda size: {
            name: jax.ShapeDtypeStruct((size, *shape), jnp.float32)
            for name, shape in arrays.items()
        },
        remat=remat,
    )
