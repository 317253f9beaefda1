"""Bytes between devices, read from programs."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from hyperlora_jax.aot.ahead_of_time import LOW_EFFORT, topology_mesh
from hyperlora_jax.aot.hlo_report import collective_bytes
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.parallel import sharding
from hyperlora_jax.parallel.topology import parse

# A scan of 3 with an asynchronous gather and a product that is windowed over 4 turns.
PROGRAM = """
%ring_cond (p: (f32[8,16], u32[])) -> pred[] {
  %p = (f32[8,16]{1,0}, u32[]) parameter(0)
  %limit = u32[]{:T(128)} constant(4)
  %turn = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%turn, %limit), direction=LT
}

%ring_body (p: (f32[8,16], u32[])) -> (f32[8,16], u32[]) {
  %send = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %sent = f32[8,16]{1,0} collective-permute-done(%send)
}

%scan_cond (p: (s32[])) -> pred[] {
  %three = s32[] constant(3)
  ROOT %less.1 = pred[] compare(%i, %three), direction=LT
}

%scan_body (p: (s32[])) -> (s32[]) {
  %gather = (bf16[4,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%w), channel_id=2, \
replica_groups={{0,1}}, dimensions={0}
  %ring = (f32[8,16]{1,0}, u32[]) while(%q), condition=%ring_cond, body=%ring_body
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[]) while(%start), condition=%scan_cond, body=%scan_body
  %sum = f32[10]{0} all-reduce(%g), channel_id=3, replica_groups={{0,1}}, to_apply=%add
}
"""


def test_bytes_of_loops_and_of_asynchronous_operations():
    mesh = topology_mesh(parse("v5e-4"), data=2, fsdp=2)
    assert collective_bytes(PROGRAM, mesh) == {
        "collective-permute": {"fsdp": 3 * 4 * 8 * 16 * 4},
        "all-gather": {"fsdp": 3 * 8 * 16 * 2},
        "all-reduce": {"fsdp": 10 * 4},
    }


SPEC = LoraSpec(
    tuple(LoraSite(f"down_blocks.{k}.attentions.0.proj.attn1.to_q", 32, 32, 1) for k in range(4))
)


@pytest.mark.parametrize("knows", [True, False])
def test_spreading_parameters_moves_no_activations(knows):
    """Bytes between devices do not grow with the batch; without `knowing` they do."""
    model = {"network": {"width": 64, "depth": 2, "num_heads": 2, "scan": True}}
    generator = build_generator(SPEC, {"generator": "regression", **model})
    mesh = topology_mesh(parse("v5e-8"), data=1, fsdp=8)

    given = Condition(jnp.zeros((1, 8)), jnp.zeros((1, 4, 8)))
    params = jax.eval_shape(generator.init, jax.random.key(0), given)
    places = sharding.param_shardings(params, mesh)

    def moved(count):
        given = jnp.zeros((count, 8)), jnp.zeros((count, 4, 8))

        def loss(params, given):
            loras = generator.train(params, {}, Condition(*given), None, jax.random.key(0)).lora
            return sum(jnp.mean(leaf**2) for leaf in jax.tree.leaves(loras))

        def gradient(params, given):
            with sharding.knowing(mesh) if knows else contextlib.nullcontext():
                return jax.grad(loss)(params, given)

        split = sharding.batch_sharding(mesh)
        program = jax.jit(gradient, in_shardings=(places, split), out_shardings=places)
        lowered = program.trace(params, given).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile(compiler_options=dict(LOW_EFFORT))
        found = collective_bytes(compiled.as_text(), mesh)
        return sum(sum(axes.values()) for axes in found.values())

    few, many = moved(64), moved(512)
    assert (many < 1.01 * few) == knows
