"""The hypernetwork's losses: phases, and what the compiled program does not hold."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, spec_from_shapes
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.weights.flax_trees import param_shapes
from hyperlora_jax.train.flop_count import flops
from hyperlora_jax.train.hypernetwork.hypernet_task import Phase, hypernet_loss, hypernet_task
from hyperlora_jax.train.hypernetwork.objectives import ObjectiveWeights
from hyperlora_jax.train.loop import Batches

IN, OUT, RANK, COUNT = 37, 53, 2, 3  # sizes that nothing else has
SPEC = LoraSpec((LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", IN, OUT, RANK, "linear"),))
MODEL = {"network": {"width": 16, "depth": 1, "num_heads": 2}}


def batch(step=0):
    random = np.random.default_rng(0)
    return {
        "pooled": jnp.asarray(random.normal(size=(COUNT, 2, 5)), jnp.float32),
        "tokens": jnp.asarray(random.normal(size=(COUNT, 2, 4, 5)), jnp.float32),
        "reference_mask": jnp.asarray([[True, True], [True, False], [True, True]]),
        "target": jnp.asarray(random.normal(size=(COUNT, SPEC.num_parameters)), jnp.float32),
        "step": jnp.full(COUNT, step, jnp.int32),
    }


NO_BATCHES = mock.Mock(spec=Batches)
FROZEN = {"constants": {"mean": jnp.zeros(SPEC.num_parameters), "std": jnp.ones(2)}}


def build(kind, phases):
    generator = build_generator(SPEC, {**MODEL, "generator": kind})
    task = hypernet_task(
        generator, FROZEN, NO_BATCHES, phases=phases, condition_shapes=((5,), (4, 5))
    )
    return generator, jax.jit(task.init)(jax.random.key(0))


@pytest.mark.parametrize("kind", ["regression", "diffusion"])
def test_no_matrix_of_a_whole_layer_is_built(kind):
    weights = ObjectiveWeights(
        end_to_end=0.0, delta=1.0, whitened=1.0, l2=0.1, diffusion=float(kind == "diffusion")
    )
    phases = (Phase(weights),)
    generator, params = build(kind, phases)

    def total(params):
        losses, parts = hypernet_loss(
            params, FROZEN, batch(), jax.random.key(1),
            generator=generator, phases=phases, base=None,
        )  # fmt: skip
        return losses.mean(), parts

    program = jax.jit(jax.grad(total, has_aux=True)).lower(params)
    assert total(params)[1].keys() >= {"delta", "whitened", "l2"}
    whole = {f"{IN},{OUT}", f"{OUT},{IN}"}
    for text in (program.as_text(dialect="hlo"), program.compile().as_text()):
        shapes = {match[1] for match in re.finditer(r"f32\[([0-9,]+)\]", text)}
        assert any(f"{RANK},{OUT}" in shape for shape in shapes), "reads no shapes"
        found = [shape for shape in shapes if any(shape.endswith(size) for size in whole)]
        assert not found
        assert not [shape for shape in shapes if str(IN * OUT) in shape.split(",")]


def test_phases_follow_the_step():
    first = Phase(ObjectiveWeights(end_to_end=0.0, delta=2.0), until=10)
    second = Phase(ObjectiveWeights(end_to_end=0.0, l2=3.0))
    generator, params = build("regression", (first, second))

    @jax.jit
    def parts_at(step):
        return hypernet_loss(
            params, FROZEN, {**batch(), "step": jnp.full(COUNT, step)}, jax.random.key(1),
            generator=generator, phases=(first, second), base=None,
        )  # fmt: skip

    total, parts = parts_at(9)
    np.testing.assert_allclose(total, 2.0 * parts["delta"], rtol=1e-6)
    assert float(parts["delta"].min()) > 0 and float(jnp.abs(parts["l2"]).max()) == 0
    total, parts = parts_at(10)
    np.testing.assert_allclose(total, 3.0 * parts["l2"], rtol=1e-6)
    assert float(jnp.abs(parts["delta"]).max()) == 0


def test_model_flops_count_the_frozen_base_twice_and_the_generator_three_times():
    unet = unet_from_config(
        {
            "sample_size": 4, "in_channels": 4, "out_channels": 4, "block_out_channels": [8],
            "layers_per_block": 1, "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"], "norm_num_groups": 4,
            "cross_attention_dim": 12, "attention_head_dim": 2,
        }
    )  # fmt: skip
    weights = param_shapes(unet)
    spec = spec_from_shapes(weights, "attn-qkvo", 2)
    generator = build_generator(spec, {**MODEL, "generator": "regression"})
    images, like = 2, jax.ShapeDtypeStruct
    given = {
        **batch(),
        "latents": like((COUNT, images, 4, 4, 4), jnp.float32),
        "text": {"states": like((COUNT, images, 5, 12), jnp.float32)},
    }
    frozen = {"unet": weights}
    task = hypernet_task(
        generator, frozen, NO_BATCHES, phases=(Phase(ObjectiveWeights()),), num_images=images,
        condition_shapes=((5,), (4, 5)), base=Denoiser(unet, NoiseSchedule()),
    )  # fmt: skip
    assert task.units == {"loras": 1, "images": images}
    params, key = jax.eval_shape(task.init, jax.random.key(0)), jax.random.key(1)
    condition = Condition(jnp.zeros((COUNT, 5)), jnp.zeros((COUNT, 8, 5)))
    own = flops(lambda p: generator.net.apply({"params": p}, condition), params)
    lora = jax.eval_shape(lambda: factors.init(key, spec, COUNT))
    rows = COUNT * images
    base = flops(
        lambda w, lora, x, text: unet.apply(
            {"params": w, "lora": lora}, x, jnp.zeros(rows, jnp.int32), text
        ),
        weights, lora, like((rows, 4, 4, 4), jnp.float32), like((rows, 5, 12), jnp.float32),
    )  # fmt: skip
    assert own > 0 and base > 0
    assert task.model_flops(params, frozen, given, key) == 3 * own + 2 * base
