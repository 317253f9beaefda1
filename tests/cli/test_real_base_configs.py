"""The configs for real bases from the first command to the last, on tiny bases that PyTorch wrote:
shrunk by overrides, which only the first command is given."""

import json
from pathlib import Path

import pytest

from hyperlora_jax.cli.config import flatten, load_config
from hyperlora_jax.cli.main import main
from hyperlora_jax.train.checkpoints import read_meta
from tests.stable_diffusion import test_single_file as single
from tests.stable_diffusion.conftest import write_tokenizer, write_xl
from tests.user_world import SHRUNK, write_base, write_clip, write_onnx, write_people

REAL = ("sd15", "sdxl", "w2w_1b", "my_pictures")
SMALL = (
    "data.num_identities=4", "distill.num_concepts=2", "distill.num_steps=2", "distill.num_slots=2",
    "distill.steps_per_call=1", "train.num_steps=2", "train.batch_size=2",
    "train.batch_per_device=False", "mesh.fsdp=1", "evaluate.num_identities=1",
    "evaluate.num_validation=1", "evaluate.num_captions=2", "evaluate.num_views=1",
    "evaluate.num_candidates=2", "evaluate.num_sampling_steps=2", "evaluate.strengths=1.0",
    "evaluate.methods=('base','mean_lora','generated')",
)  # fmt: skip
PRIOR = ("distill.prior.num_images=2", "distill.prior.num_steps=2", "distill.prior.batch_size=2")


@pytest.mark.parametrize("name", REAL)
def test_a_config_for_a_real_base_stands_alone(name):
    config = load_config(name)
    values = flatten(config)
    assert not [key for key, value in values.items() if value == "pixel-art"]
    assert not {"data.style", "data.num_views"} & set(values)
    assert values["model.encoder"] != "avatar" or name == "my_pictures"
    assert (values["distill.preset"], values["distill.rank"]) == (None, None)  # as the model's
    source = Path(f"configs/{name}.py").read_text()
    assert "parent_config" not in source
    assert source.count("\n") <= 120


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_distil_train_evaluate_generate_on_a_tiny_base(name, tmp_path, capsys):
    base = tmp_path / "base"
    write_xl(base) if name == "sdxl" else write_base(base)
    world = [
        f"base={base}", f"data.source={write_people(tmp_path / 'people')}",
        f"model.encoder={write_clip(tmp_path / 'clip')}",
        f"evaluate.judges.independent={write_onnx(tmp_path / 'judge.onnx')}",
    ]  # fmt: skip
    given = [
        f"--config.{value}" for value in (*world, *SMALL, *(PRIOR if name == "w2w_1b" else ()))
    ]
    workdir = tmp_path / "run"
    run = ["--config", f"configs/{name}.py", "--workdir", str(workdir)]
    assert main(["distill", *run, *given, *SHRUNK]) == 0
    assert main(["train", *run]) == 0
    assert main(["evaluate", *run]) == 0
    picture = str(next((tmp_path / "people" / "fred").glob("*.png")))
    lora = tmp_path / "fred.safetensors"
    found = ["--checkpoint", str(workdir), "--reference", picture, "--out", str(lora)]
    capsys.readouterr()
    assert main(["generate", *found]) == 0
    assert f"wrote {lora}" in capsys.readouterr().out
    assert main(["train", *run]) == 0
    assert "already at step 2" in capsys.readouterr().out

    metrics = json.loads((workdir / "report" / "metrics.json").read_text())
    config = load_config(name)
    assert metrics["facts"]["num_targets"] == 2
    assert metrics["facts"]["training_steps"] == 2
    facts = read_meta(workdir / "checkpoints", 2)["facts"]
    dataset = json.loads((workdir / "targets" / "metadata.json").read_text())
    assert dataset["fingerprint"] == facts["spec"]  # preset and rank followed the model
    assert (dataset["facts"]["preset"], dataset["facts"]["rank"]) == (
        config.model.preset,
        config.model.rank,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_goes_the_same_way(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
    configs = single.TINY[family]
    tensors = single.original_file(configs, single.random_tensors(configs))
    base = single.write(tmp_path / "model.safetensors", tensors)
    write_tokenizer(tmp_path / "tokens")

    def run(*arguments):
        assert main([str(word) for word in arguments]) == 0, arguments

    run("inspect", base, "--tokenizer", tmp_path / "tokens")
    (unet,) = (tmp_path / "cache" / "bases").glob("*/unet/config.json")
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"sample_size": 8}))  # of 64: quick
    people = write_people(tmp_path / "people")
    world = (
        f"base={base}", f"data.source={people}", f"model.encoder={write_clip(tmp_path / 'clip')}",
        f"evaluate.judges.independent={write_onnx(tmp_path / 'judge.onnx')}", *SMALL,
    )  # fmt: skip
    given = [f"--config.{value}" for value in world]
    config = {"sd1": "sd15", "sdxl": "sdxl"}[family]
    workdir = ("--config", f"configs/{config}.py", "--workdir", tmp_path / "run")
    run("distill", *workdir, *given, *SHRUNK)
    run("train", *workdir)
    run("evaluate", *workdir)
    reference = next((people / "fred").glob("*.png"))
    found = ("--checkpoint", tmp_path / "run", "--reference", reference)
    run("generate", *found, "--out", tmp_path / "fred.safetensors")
    pictures = ("--images", people / "fred", "--num_steps", 2)
    run(
        "refine", tmp_path / "fred.safetensors", *pictures, "--out", tmp_path / "better.safetensors"
    )
    run("inspect", tmp_path / "better.safetensors", "--base", base)
    run("export", tmp_path / "run", "--out", tmp_path / "exported")
