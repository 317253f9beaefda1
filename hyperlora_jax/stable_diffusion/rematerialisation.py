"""What the backward pass recomputes instead of keeping.

none            everything is kept
block           each resnet and transformer block keeps its input only
save_attention  as block, but attention outputs are kept too: they are the costliest to recompute
full            each down, mid and up block keeps its inputs only
"""

from typing import Any

import flax.linen as nn
import jax

from hyperlora_jax.errors import UserError

REMAT_POLICIES = ("none", "block", "save_attention", "full")
ATTENTION_OUTPUT = "attention_output"


def check_remat(name: str) -> None:
    """Raises UserError for an unknown policy."""
    if name not in REMAT_POLICIES:
        raise UserError(f"remat = {name!r}, expected one of {list(REMAT_POLICIES)}")


def rematerialised(block: type[nn.Module], remat: str) -> Any:
    """A resnet or transformer block class under a policy."""
    if remat == "block":
        return nn.remat(block)
    if remat == "save_attention":
        policy = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT)
        return nn.remat(block, policy=policy)
    return block
