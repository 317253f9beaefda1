"""Batches of files."""

import os

import jax
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.factors import index, stack
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora, read_metadata, save_lora, save_loras
from hyperlora_jax.lora_files.writing import FORMATS
from tests.lora_files.conftest import random_lora
from tests.lora_files.test_round_trip import contents

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
SPEC = LoraSpec((LoraSite(BLOCK + "attn1.to_q", 8, 8, 2), LoraSite(BLOCK + "attn2.to_k", 6, 8, 3)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_gives_the_files_of_single_loras(tmp_path, format):
    loras = [random_lora(SPEC, seed) for seed in range(5)]
    texts = [{"seed": seed} for seed in range(5)]
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    done = save_loras(paths, stack(loras), SPEC, format, metadata=texts, num_workers=3)
    assert len({path.name for path in paths}) == 5
    for i, (lora, text) in enumerate(zip(loras, texts, strict=True)):
        alone = save_lora(tmp_path / f"alone{i}.safetensors", lora, SPEC, format, metadata=text)
        assert contents(done[i]) == contents(alone)
        assert read_metadata(done[i])["hyperlora.seed"] == str(i)
    assert not list(tmp_path.rglob(".*"))


def test_a_batch_that_does_not_fit_is_refused(tmp_path):
    batch = stack([random_lora(SPEC, seed) for seed in range(2)])
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(UserError, match="1 paths and 1 metadata for 2 LoRAs"):
        save_loras(paths[:1], batch, SPEC)
    with pytest.raises(UserError, match="2 paths and 1 metadata for 2 LoRAs"):
        save_loras(paths, batch, SPEC, metadata=[{}])
    with pytest.raises(UserError, match="for None LoRAs"):
        save_loras(paths[:1], index(batch, 0), SPEC)
    with pytest.raises(UserError, match="a path is given twice"):
        save_loras([paths[0]] * 2, batch, SPEC)
    assert not list(tmp_path.iterdir())
    bad = jax.tree.map(lambda leaf: np.array(leaf), batch)
    bad["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]["attn1"]["to_q"]["up"][1] = np.nan
    with pytest.raises(UserError, match=r"attn1\.to_q has NaN or Inf"):
        save_loras(paths, bad, SPEC, num_workers=1)
    assert load_lora(paths[0])[1] == SPEC
    assert not paths[1].exists()


def test_files_get_the_permissions_that_the_process_asks_for(tmp_path):
    """Threads must not see each other's umask: it is never set."""
    batch = stack([random_lora(SPEC, seed) for seed in range(40)])
    old = os.umask(0o027)
    try:
        done = save_loras([tmp_path / f"{i}" for i in range(40)], batch, SPEC, num_workers=8)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in done} == {0o640}
