"""How blocks run: equal ones in one `lax.scan` (SDXL's are up to ten deep), and what the backward
pass recomputes.

A program then holds one block instead of ten. Trees of parameters and LoRAs keep one entry for each
block (`transformer_blocks_0`, `transformer_blocks_1`, ...) wherever people and files see them.
`stack_blocks` makes the frozen parameters that a scan reads in place, `transformer_blocks` with a
leading axis; parameters that are not stacked are copied into that layout in every step. LoRAs are
small and always stacked inside the step, so their gradients have the layout of the LoRA given.

Rematerialisation:

none            everything is kept
block           each resnet and transformer block keeps its input only
save_attention  as block, but attention outputs are kept too: they are the costliest to recompute
full            each down, mid and up block keeps its inputs only
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import Array, Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.factors import stack_padded
from hyperlora_jax.stable_diffusion.networks.convolutions import TRANSFORMED

STACKED = "transformer_blocks"
_BLOCK = re.compile(rf"^{STACKED}_(\d+)$")


def stack_blocks(params: Params) -> Params:
    """Two and more blocks of one transformer become one entry with a leading axis. Traceable."""
    out = {
        name: stack_blocks(value) if isinstance(value, Mapping) else value
        for name, value in params.items()
    }
    blocks = _blocks(out)
    if len(blocks) < 2:
        return out
    rest = {name: value for name, value in out.items() if not _BLOCK.match(name)}
    return {**rest, STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def kernel_shape(params: Params, path: tuple[str, ...]) -> tuple[int, ...] | None:
    """Shape of the kernel of one layer, named as if nothing were stacked; None without it."""
    stacked = False
    node: Any = params
    for name in (*path, "kernel"):
        if isinstance(node, Mapping) and name not in node and STACKED in node:
            match = _BLOCK.match(name)
            depth = len(jax.tree.leaves(node[STACKED])[0])
            stacked = bool(match) and int(match[1]) < depth
            name = STACKED if stacked else name
        if not isinstance(node, Mapping) or not {name, TRANSFORMED} & set(node):
            return None
        if name not in node:
            return (3, 3, *node[TRANSFORMED].shape[2:])
        node = node[name]
    return tuple(node.shape[1:] if stacked else node.shape)


def scan_blocks(
    block: Callable[[Params, Array], Array],
    variables: Mapping[str, Params],
    hidden: Float[Array, "b n c"],
    depth: int,
) -> Float[Array, "b n c"]:
    """`depth` blocks one after another; `block`({"params", "lora"?}, hidden) is one of them.

    `variables` are those of the module that the blocks belong to.
    """
    params = variables["params"]
    if STACKED not in params:
        params = stack_blocks({name: params[name] for name in params if _BLOCK.match(name)})
    stacked = {"params": params[STACKED]}
    loras = variables.get("lora", {})
    # Ranks may differ between blocks and sites may be missing.
    if lora := stack_padded([loras.get(f"{STACKED}_{i}", {}) for i in range(depth)]):
        stacked["lora"] = lora
    return jax.lax.scan(lambda x, here: (block(here, x), None), hidden, stacked)[0]


def _blocks(tree: Params) -> list[Params]:
    """The blocks of a transformer in their order."""
    numbered = {int(match[1]): tree[name] for name in tree if (match := _BLOCK.match(name))}
    return [numbered[i] for i in sorted(numbered)]


REMAT_POLICIES = ("none", "block", "save_attention", "full")
ATTENTION_OUTPUT = "attention_output"


def check_remat(name: str) -> None:
    """Raises UserError for an unknown policy."""
    if name not in REMAT_POLICIES:
        raise UserError(f"remat = {name!r}, expected one of {list(REMAT_POLICIES)}")


Block = TypeVar("Block", bound=nn.Module)


def rematerialised(block: type[Block], remat: str) -> type[Block]:
    """A resnet or transformer block class under a policy."""
    if remat == "block":
        return nn.remat(block)
    if remat == "save_attention":
        policy = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT)
        return nn.remat(block, policy=policy)
    return block
