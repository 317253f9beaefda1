import pathlib

import jax
import numpy as np
import pytest

from hyperlora_jax.aot.workloads import config_workload
from hyperlora_jax.cli.config import load_config
from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures
from hyperlora_jax.pretrain.unet_finetuning import training_unet
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.train.json_lines import read_rows

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "finetune_unet.py"


@pytest.fixture
def faces(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("anna", 3), ("bert", 2)):
        folder = tmp_path / "faces" / name
        folder.mkdir(parents=True)
        for k in range(count):
            picture = random.integers(0, 255, (16, 16, 3), np.uint8)
            (folder / f"{k}.png").write_bytes(pictures.encode_png(picture))
            (folder / f"{k}.txt").write_text(f"{name} number {k}")
    return tmp_path / "faces"


def finetune(faces, workdir, *more):
    overrides = {
        "data.source": faces, "data.num_identities": 2, "train.num_steps": 3,
        "train.batch_size": 8, "train.log_every_steps": 1, "train.optimizer.warmup_steps": 1,
        "train.ema_decay": 0.5,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    arguments = ["pretrain", "--config", str(CONFIG), "--workdir", str(workdir), *flags, *more]
    code = main(arguments)
    return code, [row["loss"] for row in read_rows(workdir / "metrics.jsonl")]


def test_a_base_goes_on_from_its_own_weights_and_becomes_another_base(faces, tmp_path):
    run = tmp_path / "run"
    code, losses = finetune(faces, run)
    assert code == 0
    assert len(losses) == 3
    before, after = load_base("tiny-sd"), load_base(str(run / "base"))
    assert after.base_hash != before.base_hash
    moved = jax.tree.map(
        lambda old, new: float(np.abs(old - new).max()), before.params["unet"], after.params["unet"]
    )
    assert 0 < max(jax.tree.leaves(moved)) < 1e-2  # three steps of 1e-4, and float16
    for name in ("vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, before.params[name], after.params[name])
    code, exported = (
        main(["export", str(run), "--out", str(tmp_path / "again")]),
        tmp_path / "again",
    )
    assert code == 0
    assert load_base(str(exported)).base_hash == after.base_hash


@pytest.mark.slow
def test_from_scratch_the_weights_are_new(faces, tmp_path):
    known = ("--config.data.source=avatars", "--config.data.num_identities=4")
    _, losses = finetune(faces, tmp_path / "run", *known)
    _, fresh = finetune(faces, tmp_path / "fresh", *known, "--config.train.from_scratch=True")
    assert fresh[0] > 2 * losses[0], "what the base has learned is there, or is not"


def test_what_cannot_be_trained_is_refused():
    section = load_config(CONFIG).train
    section.dtype = "float8"
    unet = load_base("tiny-sd").unet
    with pytest.raises(UserError, match=r"train\.dtype: got 'float8'"):
        training_unet(unet, section, None)


def test_the_workload_is_the_real_unet():
    overrides = [
        f"--config.base={ROOT / 'configs' / 'bases' / 'sd15'}", "--config.data.size=512",
        "--config.train.dtype=bfloat16",
    ]  # fmt: skip
    workload = config_workload(load_config(CONFIG, overrides))
    shapes = jax.eval_shape(workload.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 859_520_964
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
    assert workload.batch(4)["latents"].shape == (4, 64, 64, 4)
    with pytest.raises(UserError, match=r"config\.task is 'base'"):
        config_workload(load_config(ROOT / "configs" / "tiny_sd.py"))
