"""`hyperlora evaluate` from a workdir, on avatars and on a folder of pictures."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.cli.config import load_config
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.evaluation import Evaluation, evaluate
from hyperlora_jax.hypernet.baselines import make_baseline
from hyperlora_jax.hypernet.hypernetwork import FOLDER, Hypernetwork
from hyperlora_jax.pictures.pictures import encode_png
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.targets.lora_targets_writer import write_lora_targets
from hyperlora_jax.worlds.avatars import Avatars

pytestmark = pytest.mark.slow

SMALL = {
    "num_identities": 3, "num_validation": 2, "num_captions": 2, "num_views": 2,
    "num_candidates": 3, "num_sampling_steps": 2, "strengths": "(1.0,2.0)",
    "methods": "('base','mean_lora','generated','shuffled')", "steps_to_quality.num_identities": 0,
    "conventional.num_identities": 1, "conventional.num_validation": 1,
    "conventional.num_slots": 2, "conventional.recipe.num_steps": 5,
    "conventional.recipe.images_per_step": 1, "judges.independent": "avatar",
}  # fmt: skip


def config_of(**changes):
    values = {**SMALL, **changes}
    return load_config(
        "configs/avatars.py", [f"--config.evaluate.{k}={v}" for k, v in values.items()]
    )


@pytest.fixture(name="people", scope="module")
def _people():
    """(name, pictures, captions) of training identities."""
    avatars, found = Avatars(), []
    for k in range(9):
        views = avatars.views("train", 4, 4 * k)
        person = avatars.identity("train", k)
        drawn = [np.asarray(avatars.render(person, view)) for view in views]
        found.append((f"person-{k}", drawn, [avatars.caption(view) for view in views]))
    return found


@pytest.fixture(name="workdir", scope="module")
def _workdir(people, tmp_path_factory):
    """A finished run: LoRA targets of the first four people, a hypernetwork of ridge regression."""
    workdir = tmp_path_factory.mktemp("run")
    sd, encoder = load_base("tiny-sd"), load_condition_encoder("avatar")
    spec = sd.lora_spec("attn-qkvo", 4)
    random = np.random.default_rng(0)
    vectors = 0.05 * random.standard_normal((4, spec.num_parameters)).astype(np.float32)
    subjects = [
        Subject(
            name,
            name,
            tuple(map(encode_png, drawn)),
            tuple(map(encode_png, drawn)),
            tuple(captions),
            lora=vector,
            split="train",
        )
        for (name, drawn, captions), vector in zip(people, vectors, strict=False)
    ]
    write_lora_targets(workdir / "targets", subjects, spec, sd.base_hash)
    baseline = {"space": "raw", "kernel_width": 0.5, "num_components": 2}
    generator = make_baseline("ridge", spec, **baseline)
    seen = np.stack([drawn for _, drawn, _ in people[:4]]).reshape(-1, 16, 16, 3)
    pooled = np.asarray(encoder.encode(seen.astype(np.float32) / 255)[0])
    constants = generator.fit(pooled.reshape(4, 4, -1).mean(axis=1), vectors)
    facts = {
        "base": "tiny-sd",
        "base_hash": sd.base_hash,
        "trained_on": [name for name, _, _ in people[:4]],
        "num_steps": 0,
    }
    model = {"generator": "ridge", "baseline": baseline}
    Hypernetwork(generator, {}, encoder, facts, model, constants).save(workdir / FOLDER)
    return workdir


@pytest.fixture(name="folder", scope="module")
def _folder(people, tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, drawn, captions in people:
        (root / name).mkdir()
        rows = []
        for k, (picture, text) in enumerate(zip(drawn, captions, strict=True)):
            Image.fromarray(picture).save(root / name / f"{k}.png")
            rows.append(json.dumps({"file_name": f"{k}.png", "text": text}))
        (root / name / "metadata.jsonl").write_text("\n".join(rows))
    return root


def test_avatars(workdir, tmp_path):
    files = evaluate(config_of(), workdir, tmp_path / "comparison.json", "the command")
    metrics = json.loads(files.metrics.read_text())
    # The judge is the condition encoder under another name: one column, and it says so.
    assert set(metrics["judges"]) == {"independent"}
    assert metrics["judges"]["independent"]["is_condition_encoder"]
    assert files.page.parent.name == "report-pixel-art"  # it was trained on other pictures
    assert metrics["judges"]["independent"]["similarity"]["copy_reference"]["mean"] > 0.99
    assert metrics["identity_top1"]["exact"]["mean"] == 1.0
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["memorisation"] == metrics["memorisation"]
    assert set(written["methods"]) == set(metrics["identity_top1"])


def test_a_folder_of_pictures(workdir, folder):
    asked = config_of(source=folder, prompts="('smiling','open mouth')")
    files = evaluate(asked, workdir)
    metrics = json.loads(files.metrics.read_text())
    assert "image_error" not in metrics and "exact" not in metrics["similarity"]
    assert metrics["similarity"]["copy_reference"]["mean"] > metrics["similarity"]["base"]["mean"]
    test = metrics["evaluation"]["test"]
    assert test["judge"] == "independent" and test["judge_is_condition_encoder"]
    assert test["pictures_shown"] == [2, 2, 2] and test["pictures_judged_by"] == [2, 2, 2]
    assert test["checked_against"] == 4
    assert "memorisation" in metrics and "Other judges" in files.page.read_text()


def test_without_the_generated_method(workdir):
    files = evaluate(config_of(methods="('base','mean_lora')"), workdir)
    metrics = json.loads(files.metrics.read_text())
    assert set(metrics["identity_top1"]) == {"base", "mean_lora", "copy_reference", "exact"}
    assert metrics["differences"] == {} and "memorisation" not in metrics


def test_a_folder_is_judged_by_somebody_and_needs_newcomers(workdir, folder):
    without = Evaluation(config_of(source=folder, **{"judges.independent": ""}), workdir)
    assert without.test.facts["judge"] == "own"
    assert any("no judge was given" in note for note in without.notes)
    with pytest.raises(UserError, match=r"num_identities: got 4, but .* has 3 subjects"):
        Evaluation(config_of(source=folder, num_identities=4), workdir)


def started(workdir, changes, environment):
    """The command in a process of its own with two devices."""
    values = {**SMALL, **changes}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "hyperlora_jax", "evaluate", "--config", "configs/avatars.py"),
            *("--workdir", str(workdir)),
            *(f"--config.evaluate.{name}={value}" for name, value in values.items()),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(processes):
    """What they printed, once all are done."""
    outputs = [process.communicate(timeout=500) for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(codes), [error[-2000:] for _, error in outputs]
    return outputs


def numbers(found, path=""):
    """{path: number} of nested scores."""
    if isinstance(found, dict):
        nested = [numbers(value, f"{path}/{name}") for name, value in found.items()]
        return {name: value for part in nested for name, value in part.items()}
    return {path: found} if isinstance(found, float) else {}


def test_two_hosts_evaluate_as_one(workdir, tmp_path, as_hosts):
    methods = ["base", "generated", "conventional"]
    asked = {
        "methods": repr(tuple(methods)), "conventional.num_identities": 3,
        "conventional.num_validation": 2, "strengths": "(1.0,)",
    }  # fmt: skip
    curves = {"steps_to_quality.num_identities": 3, "steps_to_quality.checkpoints": "(0,5)"}
    for name in ("alone", "pod"):
        shutil.copytree(workdir, tmp_path / name, ignore=shutil.ignore_patterns("samples"))

    def together(changes):
        return finished([started(tmp_path / "pod", changes, own) for own in as_hosts()])

    finished([started(tmp_path / "alone", {**asked, **curves}, {})])
    (first, _), (second, bars) = together({**asked, **curves})
    assert "report-pixel-art/index.html" in first
    assert "wrote" not in second and "LoRAs" not in bars
    alone, pod = (
        json.loads((tmp_path / name / "report-pixel-art" / "metrics.json").read_text())
        for name in ("alone", "pod")
    )
    scores = ("identity_top1", "image_error", "caption_accuracy", "judges", "memorisation")
    for score in scores:
        ours, theirs = numbers(pod[score]), numbers(alone[score])
        assert ours.keys() == theirs.keys() and ours
        np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=2e-3, atol=1e-4)
    found = [run["steps_to_quality"]["curves"]["zero"]["image_error"] for run in (pod, alone)]
    for ours, theirs in zip(*found, strict=True):
        assert ours["n"] == 3 and ours["mean"] == pytest.approx(theirs["mean"], rel=1e-3)
    # What was made together is found again; only the new method is drawn.
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "pod" / "samples").iterdir()}
    together({**asked, "methods": repr((*methods, "mean_lora"))})
    now = {file: file.stat().st_mtime_ns for file in (tmp_path / "pod" / "samples").iterdir()}
    assert kept.items() < now.items() and len(now) == len(kept) + 1
