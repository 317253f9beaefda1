import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.train.json_lines import read_rows
from hyperlora_jax.train.pretraining import pretrain

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "tiny_sd.py"


@pytest.fixture
def config(tmp_path):
    spec = importlib.util.spec_from_file_location("tiny_sd", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.num_identities, config.data.num_views = 8, 2
    config.base.unet.block_out_channels = (16, 16)
    config.autoencoder.num_steps = config.train.num_steps = 3
    config.autoencoder.batch_size = config.train.batch_size = 8
    config.autoencoder.log_every_steps = config.train.log_every_steps = 1
    config.export.path = str(tmp_path / "base")
    return config


@pytest.mark.slow
def test_a_base_is_trained_exported_and_trained_only_once(config, tmp_path):
    out = pretrain(config, tmp_path / "run")
    sd = load_base(str(out))
    image = np.asarray(sd.sample(jax.random.key(0), ["blue background"], num_steps=2))
    assert image.shape == (1, 16, 16, 3)
    assert np.isfinite(image).all()
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3
    pretrain(config, tmp_path / "run")
    assert len(list(read_rows(tmp_path / "run" / "metrics.jsonl"))) == 3
    again = load_base(str(out))
    assert again.base_hash == sd.base_hash
