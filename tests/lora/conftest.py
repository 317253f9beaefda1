"""Small specs with square and oblong layers, a convolution, and mixed ranks."""

import jax
import numpy as np
import pytest

from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSite, LoraSpec

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."


@pytest.fixture(scope="session")
def spec():
    return LoraSpec(
        (
            LoraSite(BLOCK + "attn1.to_out.0", 6, 6, 2),
            LoraSite(BLOCK + "attn2.to_k", 5, 6, 3),
            LoraSite("down_blocks.0.downsamplers.0.conv", 4, 6, 2, "conv", (3, 3), (2, 2)),
        )
    )


@pytest.fixture(scope="session")
def random_lora(spec):
    def make(num=None, seed=0):
        random = np.random.default_rng(seed)
        tree = factors.zeros(spec, num)
        return jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), tree)

    return make
