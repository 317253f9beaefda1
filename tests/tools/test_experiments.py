"""tools/experiments.py: its configs exist, equal runs are shared, finished ones are kept."""

import json
import pathlib

import experiments as program
import experiments_page
import pytest

from hyperlora_jax.cli.config import load_config
from hyperlora_jax.hypernet.building import architecture, build_generator
from hyperlora_jax.shipped import base_path
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.train.hypernetwork.hypernet_training import make_phases

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def experiments():
    return program


def test_every_run_is_a_config_that_can_be_built(experiments):
    outline = StableDiffusion.outline(base_path("tiny-sd"))
    for experiment in experiments.EXPERIMENTS.values():
        for run in experiment.runs.values():
            overrides = [f"--config.{name}={value}" for name, value in run.changes.items()]
            config = load_config(ROOT / run.config, overrides)
            spec = outline.lora_spec(config.model.preset, config.model.rank)
            generator = build_generator(spec, architecture(config.model))
            assert make_phases(config.train) or generator


def score(mean):
    return {"mean": mean, "stderr": 0.01, "n": 64}


@pytest.fixture
def measured(experiments, monkeypatch):
    """What was trained instead of kept, in order; nothing is trained really."""
    done = []

    def measure(config, folder, run):
        done.append(config.train.num_steps)
        (folder / "encoded" / "abc").write_bytes(b"pictures")
        scores = dict.fromkeys(("identity_top1", "image_error", "caption_accuracy"), score(0.5))
        return {
            **scores, "strength": 1.0, "guidance": 1.0, "steps": done[-1], "cpu_seconds": 60.0,
        }  # fmt: skip

    monkeypatch.setattr(experiments, "measure", measure)
    return done


def test_equal_runs_of_two_experiments_are_trained_once(experiments, measured, tmp_path):
    flags = ["--targets", str(tmp_path), "--workdir", str(tmp_path / "w")]
    for name in ("compute", "objectives", "compute"):
        file = tmp_path / f"experiment_{name}.json"
        assert experiments.main([name, *flags, "--json", str(file)]) == 0
    pictures = experiments.EXPERIMENTS["objectives"].runs["regression, pictures"]
    assert pictures in experiments.EXPERIMENTS["compute"].runs.values()
    runs = [e.runs for n, e in experiments.EXPERIMENTS.items() if n in ("compute", "objectives")]
    assert len(measured) == sum(map(len, runs)) - 1
    record = json.loads((tmp_path / "experiment_compute.json").read_text())
    assert [row["run"] for row in record["rows"]] == [*experiments.EXPERIMENTS["compute"].runs]
    assert experiments_page.table(record)[0][-2:] == ["60 s", "1"]
    kept = tmp_path / "w" / "shared" / "encoded" / "abc"
    assert kept.read_bytes() == b"pictures"


def test_seeds_are_rows_of_their_own(experiments, measured, tmp_path):
    file = tmp_path / "e.json"
    flags = ["--targets", str(tmp_path), "--workdir", str(tmp_path / "w"), "--json", str(file)]
    experiments.main(["compute", *flags, "--only", "250"])
    experiments.main(["compute", *flags, "--only", "250", "--seeds", "1", "2"])
    assert [row["seed"] for row in json.loads(file.read_text())["rows"]] == [0, 1, 2]
    flags[3] = str(tmp_path / "another")  # a working folder that knows of none of them
    experiments.main(["compute", *flags, "--only", "250", "--seeds", "3"])
    assert [row["seed"] for row in json.loads(file.read_text())["rows"]] == [0, 1, 2, 3]


def test_methods_of_one_training_are_rows_of_their_own(experiments, measured, tmp_path):
    file = tmp_path / "e.json"
    flags = ["--workdir", str(tmp_path / "w"), "--json", str(file)]
    assert experiments.main(["references", *flags]) == 0
    runs = experiments.EXPERIMENTS["references"].runs
    rows = json.loads(file.read_text())["rows"]
    assert [row["run"] for row in rows] == [*runs]
    assert [row["method"] for row in rows][-1] == "generated_8"
    assert len({experiments.run_folder(tmp_path, run, 0) for run in runs.values()}) == 2
    with pytest.raises(SystemExit):
        experiments.main(["gauges", *flags])


def test_recipes_are_rows_of_one_training(experiments, measured, tmp_path):
    file = tmp_path / "e.json"
    flags = ["--workdir", str(tmp_path / "w"), "--json", str(file)]
    for name in ("conventional", "refine"):
        assert experiments.main([name, *flags]) == 0
        runs = experiments.EXPERIMENTS[name].runs
        rows = json.loads(file.read_text())["rows"]
        assert [row["run"] for row in rows] == [*runs]
        assert all(row["choosing"] for row in rows)
        assert len({experiments.run_folder(tmp_path, run, 0) for run in runs.values()}) == 1
