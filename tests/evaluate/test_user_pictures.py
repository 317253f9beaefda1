"""`hyperlora evaluate` on what a user has: no LoRA dataset, folders of 2 to 6 pictures, an ONNX
encoder, nobody independent to judge."""

import json
import shutil

import pytest

from hyperlora_jax.cli.config import overridden
from hyperlora_jax.cli.main import main
from hyperlora_jax.cli.workdir_config import read_config
from hyperlora_jax.evaluate.evaluation import Evaluation
from hyperlora_jax.evaluate.report.wording import counted
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from tests import user_world

pytestmark = pytest.mark.slow

FAST = {
    "num_sampling_steps": 2, "num_captions": 2, "strengths": "(1.0,2.0)",
    "conventional.recipe.num_steps": 2, "conventional.recipe.images_per_step": 1,
    "conventional.num_slots": 3, "steps_to_quality.num_identities": 0,
}  # fmt: skip


@pytest.fixture(name="world", scope="module")
def _world(tmp_path_factory):
    """A checkpoint of three of six people, trained for 3 steps."""
    root = tmp_path_factory.mktemp("world")
    user_world.write_base(root / "base")
    user_world.write_onnx(root / "encoder.onnx")
    user_world.write_people(root / "people")
    changes = {
        "base": root / "base", "data.source": root / "people", "data.num_identities": 3,
        "model.encoder": root / "encoder.onnx", "train.num_steps": 3, "train.batch_size": 2,
        "train.images_per_subject": 1,
    }  # fmt: skip
    trained = main(
        ["train", "--config", "configs/avatars.py", "--workdir", str(root / "run")]
        + [f"--config.{key}={value}" for key, value in changes.items()]
        + list(user_world.SHRUNK)
    )
    assert trained == 0
    return root


def evaluate(workdir, **changes):
    asked = {**FAST, **changes}
    overrides = [f"--config.evaluate.{key}={value}" for key, value in asked.items()]
    return main(["evaluate", "--workdir", str(workdir), *overrides])


@pytest.fixture(name="run")
def _run(world, tmp_path):
    return shutil.copytree(world / "run", tmp_path / "run")


def test_the_workdir_alone_is_enough(world, run, capfd):
    methods = "('base','shuffled','generated','conventional')"
    assert evaluate(run, methods=methods) == 0
    said = capfd.readouterr().out.splitlines()
    assert any(
        line.startswith("sizes that fit") and "num_identities 2 instead of 64" in line
        for line in said
    )
    assert any("no judge was given" in line and "not independent" in line for line in said)
    (chosen,) = [line for line in said if "default strength" in line]
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    test = metrics["evaluation"]["test"]
    (checkpoint,) = [Hypernetwork.restore(run)]
    best = metrics["strength"]["generated"]["best"]
    assert checkpoint.default_strength == best == metrics["facts"]["defaults"]["strength"][1]
    assert f"{run}/hypernetwork: default strength" in chosen and "subject of people" in chosen
    assert test["num_identities"] == 2 and test["num_candidates"] == 6
    assert test["judge"] == "own" and test["judge_is_condition_encoder"]
    everybody = {"dora": (2, 2), "emil": (2, 4), "fred": (2, 1)}
    counts = set(zip(test["pictures_shown"], test["pictures_judged_by"], strict=True))
    assert counts < set(everybody.values())
    assert set(metrics["identity_top1"]) == {
        "base", "shuffled", "generated", "conventional", "copy_reference",
    }  # fmt: skip
    assert "memorisation" not in metrics and metrics["facts"]["num_targets"] == 0
    page = (run / "report" / "index.html").read_text()
    assert "trained for 3 steps, which took" in page and "on 3 identities of people" in page
    assert "The judge is not independent" in page and "6,000 steps" not in page
    assert "nan" not in page.split("<h2>To run it again</h2>")[0].replace("finance", "")


def test_methods_that_need_loras_are_left_out_or_refused(world, run, capsys):
    config = overridden(read_config(run), [])
    evaluation = Evaluation(config, run)
    assert evaluation.names == [
        "base", "shuffled", "generated", "refined_25", "conventional_1", "conventional",
    ]  # fmt: skip
    line = "left out mean_lora, nearest, knn, ridge, pca_gaussian, noisy_copy"
    assert any(note.startswith(line) for note in evaluation.notes)
    assert evaluation.test.seen_references.shape[1:] == (28, 28, 3)  # what the encoder looks at
    assert evaluation.test.references.shape[1:] == (32, 32, 3)
    assert evaluate(run, methods="('base','nearest')") == 2
    assert "nearest cannot run" in capsys.readouterr().err
    assert evaluate(run, num_identities=9) == 2
    assert "--config.evaluate.num_identities: got 9, but" in capsys.readouterr().err
    assert not (run / "report").exists()


def test_loras_without_pictures_serve_the_mean(world, run, tmp_path, capfd):
    made = ["--checkpoint", str(run), "--out", str(tmp_path / "loras")]
    assert main(["generate", *made, "--subjects", str(world / "people")]) == 0
    files = [str(tmp_path / "loras" / f"{name}.safetensors") for name in ("anna", "bert", "carl")]
    imported = str(tmp_path / "imported")
    assert main(["import", *files, "--base", str(world / "base"), "--out", imported]) == 0
    capfd.readouterr()
    overrides = [f"--config.data.targets={imported}", "--config.evaluate.judges.independent=avatar"]
    overrides += [f"--config.evaluate.{key}={value}" for key, value in FAST.items()]
    evaluation = Evaluation(overridden(read_config(run), overrides), run)
    assert {"mean_lora", "pca_gaussian"} <= {*evaluation.names}
    assert not {"nearest", "knn", "ridge", "noisy_copy"} & {*evaluation.names}
    assert any("holds no reference pictures" in note for note in evaluation.notes)
    asked = [*overrides, "--config.evaluate.methods=('mean_lora','generated')"]
    assert main(["evaluate", "--workdir", str(run), *asked]) == 0
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["evaluation"]["test"]["judge"] == "independent"
    assert metrics["judges"]["own"]["is_condition_encoder"]
    assert not metrics["judges"]["independent"]["is_condition_encoder"]
    page = (run / "report" / "index.html").read_text()
    assert counted(metrics["facts"]["num_targets"], "conventional LoRA") in page
    assert "collected; of them comes the mean LoRA." in page


def test_other_pictures_have_a_report_of_their_own_and_change_nothing(world, run, tmp_path, capfd):
    others = user_world.write_people(
        tmp_path / "others", {"gina": (3, (30, 30)), "hans": (2, (40, 30)), "ines": (1, (30, 30))}
    )
    assert evaluate(run, source=others, methods="('generated',)") == 0
    said = capfd.readouterr().out
    assert "default strength stays 1, as these are not the pictures" in said
    assert "left out, as a subject with one picture has none to judge by: ines" in said
    assert (run / "report-others" / "index.html").exists() and not (run / "report").exists()
    assert Hypernetwork.restore(run).default_strength == 1.0
    metrics = json.loads((run / "report-others" / "metrics.json").read_text())
    assert not metrics["facts"]["defaults"]["kept"]
    # The config of another run: its pictures are not meant by accident.
    own = json.loads((run / "config.json").read_text())
    own["config"]["data"]["source"], own["config"]["given"] = str(others), []
    (run / "config.json").write_text(json.dumps(own))
    assert evaluate(run) == 2
    error = capfd.readouterr().err
    assert f"was trained on {world / 'people'}, but the config says data.source = {others}" in error
