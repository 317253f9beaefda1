"""Loss and LoRA gradients of a small UNet on 1 and on 8 simulated devices; prints JSON lines.

Arguments: ATTENTION:DATA,FSDP,TENSOR:HEADS ...
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import spec_from_shapes
from hyperlora_jax.parallel import sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.stable_diffusion.networks import attention_kernels
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params

BATCH = 8


def config(heads):
    return {
        "sample_size": 16,
        "block_out_channels": [24, 48],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "mid_block_type": "UNetMidBlock2D",
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": heads,
    }


def arguments(unet):
    params = init_params(unet, jax.random.key(0))
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32),
        factors.zeros(spec_from_shapes(params, "attn-qkvo", 2), BATCH),
    )
    batch = {
        "latents": rng.standard_normal((BATCH, 16, 16, 4)).astype(np.float32),
        "times": np.linspace(0, 999, BATCH).astype(np.float32),
        "text": rng.standard_normal((BATCH, 5, 16)).astype(np.float32),
    }
    return lora, params, batch


def run(unet, devices, axes, lora, params, batch):
    mesh = make_mesh(*axes, devices=devices)
    unet = unet.clone(mesh=mesh)
    rows = sharding.batch_sharding(mesh)
    places = sharding.param_shardings(params, mesh)

    def loss(lora, params, batch):
        variables = {"params": params, "lora": lora}
        out = unet.apply(variables, batch["latents"], batch["times"], batch["text"])
        return jnp.square(out).mean(), out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=(rows, places, rows))
    return jax.device_get(step(lora, params, batch)), sharding.describe(params, places)


def main():
    attention_kernels._SPLASH_TOKENS = 256
    attention_kernels.splash_attention = functools.partial(
        attention_kernels.splash_attention, interpret=True
    )
    alone = {}
    for text in sys.argv[1:]:
        attention, axes, heads = text.split(":")
        axes = [int(axis) for axis in axes.split(",")]
        unet = unet_from_config(config(int(heads)))
        inputs = arguments(unet)
        if heads not in alone:
            alone[heads], _ = run(unet, jax.devices()[:1], (1, 1, 1), *inputs)
        spread, placed = run(unet.clone(attention=attention), jax.devices(), axes, *inputs)
        pairs = zip(jax.tree.leaves(spread), jax.tree.leaves(alone[heads]), strict=True)
        errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
        print(json.dumps({"case": text, "error": max(errors), "placed": placed}), flush=True)


if __name__ == "__main__":
    main()
