"""The hypernetwork's losses: phases, and what the compiled program does not hold."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.objectives import ObjectiveWeights
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.train.hypernet_task import Base, Phase, hypernet_loss, hypernet_task

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


FROZEN = {"constants": {"mean": jnp.zeros(SPEC.num_parameters), "std": jnp.ones(2)}}


def build(kind, phases):
    generator = build_generator(SPEC, {**MODEL, "generator": kind})
    task = hypernet_task(generator, FROZEN, None, phases=phases, condition_shapes=((5,), (4, 5)))
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
            generator=generator, phases=phases, base=Base(),
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
            generator=generator, phases=(first, second), base=Base(),
        )  # fmt: skip

    total, parts = parts_at(9)
    np.testing.assert_allclose(total, 2.0 * parts["delta"], rtol=1e-6)
    assert float(parts["delta"].min()) > 0 and float(jnp.abs(parts["l2"]).max()) == 0
    total, parts = parts_at(10)
    np.testing.assert_allclose(total, 3.0 * parts["l2"], rtol=1e-6)
    assert float(jnp.abs(parts["delta"]).max()) == 0
