"""Experiments on the avatar world: which hypernetwork writes the best LoRA, and why.

    hyperlora distill --config configs/distill_avatars.py --workdir runs/targets
    python tools/experiments.py NAME --targets runs/targets/targets --workdir runs/experiments
    python tools/make_results.py

Every experiment is a table of runs; every run trains a config of this repository with some values
changed and is scored on the same held-out identities, captions and noise, at its own best strength
(and guidance) of the validation identities. Finished runs are kept, and shared by all experiments:
the same command goes on with the first that is not, and adds new seeds; a training that was cut off
begins again, because its whole CPU time counts. Writes docs/measurements/experiment_NAME.json,
which tools/make_results.py turns into a table of docs/results.md.
"""

import argparse
import dataclasses
import gc
import hashlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCORES = ("identity_top1", "image_error", "caption_accuracy")
SHARED = ("renders", "cache", "encoded")  # folders that all runs of a dataset can share
PAPER = "configs/paper.py"
AVATARS = "configs/avatars.py"


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of an experiment: a config file, what is changed in it, and the method (of
    `evaluate/method_loras.py`) whose LoRAs are scored. Rows of one training are its methods, and
    what is changed in `evaluate` alone. Where `choosing`, a row is there to choose a recipe by: it
    tells the scores of validation identities."""

    config: str = AVATARS
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: str = "generated"
    choosing: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A question, and the runs that answer it."""

    title: str
    runs: Mapping[str, Run]


# About five minutes of a core each. On latents a step of the paper's denoiser costs what its 100 M
# parameters cost, at any batch; raw vectors are 45 times as long.
LATENT_STEPS = {
    "train.batch_size": 256, "train.num_steps": 300, "train.optimizer.learning_rate": 5e-4,
}  # fmt: skip
CHOOSING = 24  # validation identities that recipes are chosen by
RAW_STEPS = {**LATENT_STEPS, "train.batch_size": 64}


def _closed(kind: str, **changes: Any) -> Run:
    return Run(changes={"model.generator": kind, **changes})


def _paper_grid() -> dict[str, Run]:
    def cell(generator: str, prediction: str, conditioning: str, **more: Any) -> Run:
        changes = {
            "model.generator": generator,
            "model.diffusion.prediction": prediction,
            "model.mlp.conditioning": conditioning,
        }
        return Run(PAPER, {**changes, **more})

    runs = {
        f"{space}, {prediction}, {conditioning}": cell(generator, prediction, conditioning, **steps)
        for space, generator, steps in (
            ("VAE latents", "latent_diffusion", LATENT_STEPS),
            ("raw", "diffusion", RAW_STEPS),
        )
        for prediction in ("x0", "v")
        for conditioning in ("adanorm", "adalora")
    }
    best = ("x0", "adalora")
    runs["VAE latents, x0, adalora, 2,000 steps of 64"] = cell(
        "latent_diffusion", *best, **{"train.num_steps": 2000}
    )
    runs["raw, x0, adalora, no SVD but one initialisation"] = cell(
        "diffusion", *best, **RAW_STEPS, **{"data.gauge": "raw"}
    )
    return runs


def _paper_curves() -> dict[str, Run]:
    """One thing changed at a time. `--targets` of 4,096, as `configs/distill_avatars.py` makes them
    with `--config.distill.num_concepts=4096`."""
    start = {
        "model.generator": "diffusion",
        "model.diffusion.prediction": "x0",
        "model.mlp.conditioning": "adanorm",
        **RAW_STEPS,
        "data.gauge": "raw",
    }
    changed = {"all targets, 300 steps, one initialisation": {}}
    for count in (256, 512, 1024, 2048):
        changed[f"{count:,} targets"] = {"data.num_targets": count}
    for steps in (1200, 4800):
        changed[f"{steps:,} steps"] = {"train.num_steps": steps}
    for gauge in ("svd", "procrustes"):
        changed[f"gauge {gauge}"] = {"data.gauge": gauge}
    return {name: Run(PAPER, {**start, **changes}) for name, changes in changed.items()}


def _weights(steps: int, **objectives: float) -> dict[str, Any]:
    """Training on LoRA targets alone."""
    named = {"end_to_end": 0.0, **objectives}
    found = {f"train.objectives.{name}": value for name, value in named.items()}
    return {**found, "train.num_steps": steps}


def _objectives() -> dict[str, Run]:
    pictures = {"train.num_steps": 1000}
    tokens = {"model.generator": "diffusion", "train.images_per_subject": 1}
    return {
        "regression, pictures": Run(changes=pictures),
        "regression, delta": Run(changes=_weights(2000, delta=1.0)),
        "regression, whitened factors": Run(changes=_weights(2000, whitened=1.0)),
        "regression, delta then pictures": Run(
            changes={**pictures, "train.num_steps": 1500, "train.warm_up.num_steps": 1000}
        ),
        "iterative regression, pictures": Run(
            changes={**pictures, "train.num_steps": 300, "model.generator": "iterative"}
        ),
        "token diffusion, x0": Run(changes={**_weights(1200, diffusion=1.0), **tokens}),
    }


def _gauges() -> dict[str, Run]:
    spaces = {"raw": ("raw", "raw"), "svd": ("svd", "raw"), "procrustes": ("procrustes", "raw"),
              "delta space": ("raw", "delta")}  # fmt: skip
    return {
        f"{kind}, {name}": _closed(kind, **{"data.gauge": gauge, "model.baseline.space": space})
        for kind in ("ridge",)
        for name, (gauge, space) in spaces.items()
    }


def _num_targets() -> dict[str, Run]:
    closed = {
        f"{kind}, {count or 'all'} targets": _closed(
            kind, **{"data.num_targets": count, "model.baseline.num_neighbours": 20}
        )
        for kind in ("nearest", "ridge")
        for count in (100, 300, 0)
    }
    delta = _weights(2000, delta=1.0)
    counts = {"100": {"data.num_targets": 100}, "300": {"data.num_targets": 300}, "all": {}}
    trained = {
        f"regression, delta, {count} targets": Run(changes={**delta, **changes})
        for count, changes in counts.items()
    }
    return {**closed, **trained}


def _num_subjects() -> dict[str, Run]:
    steps = {"train.num_steps": 500}
    counts = {100: {"data.num_identities": 100}, 300: {"data.num_identities": 300}, 2048: {}}
    return {f"pictures, {n} subjects": Run(changes={**steps, **c}) for n, c in counts.items()}


def _compute() -> dict[str, Run]:
    return {
        f"pictures, {steps} steps": Run(changes={"train.num_steps": steps})
        for steps in (250, 500, 1000)
    }


def _optimizers() -> dict[str, Run]:
    """The demo's training, but of two blocks; tried on as many people as on the other pages."""
    tried = {
        "model.network.depth": 2,
        "evaluate.num_validation": 48,
        "evaluate.strengths": (1.0, 1.25, 1.5, 2.0),
    }

    def run(name: str, steps: int, rate: float) -> Run:
        trained = {"name": name, "learning_rate": rate}
        changes = {f"train.optimizer.{key}": value for key, value in trained.items()}
        return Run("configs/demo.py", {"train.num_steps": steps, **changes, **tried})

    return {
        "AdamW, 350 steps": run("adamw", 350, 2e-3),
        "AdamW, 700 steps": run("adamw", 700, 2e-3),
        "Muon, 350 steps": run("muon", 350, 3e-3),
    }


SEVERAL = Run(changes={"train.num_steps": 3000, "train.num_references": (1, 8)})


def _references() -> dict[str, Run]:
    runs = {"trained with 1, told by 1": Run(changes={"train.num_steps": 3000})}
    for count in (1, 2, 4, 8):
        method = f"generated_{count}" if count > 1 else "generated"
        runs[f"trained with 1 to 8, told by {count}"] = dataclasses.replace(SEVERAL, method=method)
    return runs


def _recipes(
    method: str, section: str, run: Run, steps: Sequence[int], rates: Sequence[float]
) -> dict[str, Run]:
    """Fits by every recipe, scored on validation identities alone."""
    asked = {
        **run.changes,
        "evaluate.num_validation": CHOOSING,
        "evaluate.conventional.num_validation": CHOOSING,
        "evaluate.conventional.num_identities": 1,  # of the test ones, as some must be there
        "evaluate.conventional.num_slots": CHOOSING + 1,
    }
    found = {}
    for count in steps:
        for rate in rates:
            recipe = {f"{section}.recipe.learning_rate": rate}
            if "{" not in method:
                recipe[f"{section}.recipe.num_steps"] = count
            name = f"{count} steps, learning rate {rate:g}"
            changes = {**asked, **recipe}
            found[name] = Run(run.config, changes, method.format(count), choosing=True)
    return found


def _conventional(config: str) -> dict[str, Run]:
    """The yardstick's recipe. An evaluation belongs to a checkpoint, whatever it is like."""
    run = Run(config, {"train.num_steps": 1, "data.num_identities": 64})
    where = "evaluate.conventional"
    return _recipes("conventional", where, run, (150, 300, 600), (0.003, 0.01, 0.02))


def _demo() -> dict[str, Run]:
    """The demo's yardstick, which has to be a short one."""
    changes = {
        "train.num_steps": 1, "data.num_identities": 64, "evaluate.identities_per_batch": 16,
        "evaluate.conventional.recipe.images_per_step": 4,
    }  # fmt: skip
    run = Run("configs/demo.py", changes)
    return _recipes("conventional", "evaluate.conventional", run, (75, 150), (0.01, 0.02))


def _refine(run: Run) -> dict[str, Run]:
    """What refinement does in 25 steps and more."""
    return _recipes("refined_{}", "evaluate.refine", run, (25, 50), (0.003, 0.01, 0.02))


EXPERIMENTS = {
    "conventional": Experiment("The best conventional recipe", _conventional(AVATARS)),
    "refine": Experiment("The best way to refine", _refine(SEVERAL)),
    "conventional_heads": Experiment(
        "The best conventional recipe on heads", _conventional("configs/heads.py")
    ),
    "conventional_fonts": Experiment(
        "The best conventional recipe on fonts", _conventional("configs/fonts.py")
    ),
    "conventional_demo": Experiment("The demo's conventional recipe, 4 pictures a step", _demo()),
    "gauges": Experiment("Which form of a LoRA is learned best?", _gauges()),
    "num_targets": Experiment("How many LoRA targets are enough?", _num_targets()),
    "num_subjects": Experiment("How many subjects are enough?", _num_subjects()),
    "compute": Experiment("How long should a hypernetwork train on pictures?", _compute()),
    "optimizers": Experiment("How fast does a hypernetwork learn with Muon?", _optimizers()),
    "references": Experiment("What do more pictures of a subject tell?", _references()),
    "objectives": Experiment("Objective and generator", _objectives()),
    "paper": Experiment("The paper's grid (arXiv 2412.02352)", _paper_grid()),
    "paper_curves": Experiment("Where does the paper's recipe saturate?", _paper_curves()),
}

WITHOUT_TARGETS = (
    "conventional", "conventional_demo", "conventional_heads", "conventional_fonts", "refine",
    "references", "compute", "optimizers",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Parses, runs what is missing, writes the JSON after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(EXPERIMENTS))
    parser.add_argument("--targets", help="LoRA-target dataset, of experiments that learn from one")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds")
    parser.add_argument("--only", help="runs whose name contains this")
    parser.add_argument("--json", help="default: docs/measurements/experiment_NAME.json")
    given = parser.parse_args(arguments)
    from hyperlora_jax.errors import UserError
    from hyperlora_jax.parallel import compilation_cache, cpu_devices

    compilation_cache.enable()
    cpu_devices.prepare()
    experiment = EXPERIMENTS[given.name]
    file = pathlib.Path(given.json or ROOT / f"docs/measurements/experiment_{given.name}.json")
    workdir = pathlib.Path(given.workdir)
    targets = given.targets and pathlib.Path(given.targets).resolve()
    if not targets and given.name not in WITHOUT_TARGETS:
        parser.error(f"--targets: {given.name} learns from a LoRA-target dataset")
    try:
        for seed in given.seeds:
            for name, run in experiment.runs.items():
                if given.only and given.only not in name:
                    continue
                row = kept_row(name, run, seed, targets, workdir)
                print(f"{name}, seed {seed}: {_brief(row)}", flush=True)
                write(file, given.name, experiment, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {file}")
    return 0


def kept_row(
    name: str, run: Run, seed: int, targets: pathlib.Path | None, workdir: pathlib.Path
) -> dict[str, Any]:
    """The scores of one run, from its folder if the same run was finished before."""
    from hyperlora_jax.cli.config import load_config

    changes = {**run.changes, "data.targets": str(targets or ""), "train.seed": seed}
    if run.config == PAPER:  # runs of the grid share the VAE
        changes["train.vae.workdir"] = str(workdir / f"vae-{seed}")
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    folder = run_folder(workdir, run, seed)
    kept = folder / _row_file(run)
    if kept.exists():
        return {**json.loads(kept.read_text()), "run": name}
    folder.mkdir(parents=True, exist_ok=True)
    _share(folder, workdir / "shared")
    config = load_config(ROOT / run.config, overrides)
    asked = {
        "config": run.config,
        "changes": dict(run.changes),
        "method": run.method,
        "seed": seed,
        "choosing": run.choosing,
    }
    row = {"run": name, **asked, **measure(config, folder, run)}
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(json.dumps(row, indent=1))
    temporary.replace(kept)
    return row


def run_folder(workdir: pathlib.Path, run: Run, seed: int | str) -> pathlib.Path:
    """WORKDIR/DIGEST-SEED: the digest is of what is trained, whatever experiment it belongs to."""
    trained = {key: value for key, value in run.changes.items() if not _evaluates(key)}
    return workdir / f"{_digest([run.config, trained])}-{seed}"


def _row_file(run: Run) -> str:
    evaluated = {key: value for key, value in run.changes.items() if _evaluates(key)}
    parts = ["row"] if run.method == "generated" else ["row", run.method]
    return "-".join([*parts, *([_digest(evaluated)] if evaluated else [])]) + ".json"


def _evaluates(key: str) -> bool:
    return key.startswith("evaluate.")


def _digest(asked: object) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def measure(config: Any, folder: pathlib.Path, run: Run) -> dict[str, Any]:
    """Trains one config, if that is not done yet, and scores it on the held-out identities."""
    from hyperlora_jax.evaluate.evaluation import Evaluation
    from hyperlora_jax.train.hypernetwork.hypernet_training import train_hypernetwork

    method = run.method
    config.evaluate.methods = (method,)
    timed = folder / "trained.json"
    if not timed.exists():
        _empty(folder)  # half a training that goes on here would cost half as much
        start = time.process_time()
        train_hypernetwork(config, folder)
        timed.write_text(json.dumps({"cpu_seconds": round(time.process_time() - start, 1)}))
    gc.collect()
    evaluation = Evaluation(config, folder)
    summary = evaluation.summary(evaluation.run())
    chosen = summary["strength"][method]
    scores = {score: summary[score][method] for score in (*SCORES, "diversity")}
    if run.choosing:
        best = [p for p in chosen["validation"] if p["strength"] == chosen["best"]]
        scores = {score: best[0][score] for score in SCORES}
    return {
        **scores,
        "strength": chosen["best"],
        "guidance": chosen.get("guidance", 1.0),
        "steps": config.train.num_steps if evaluation.hyper.params else 0,
        **json.loads(timed.read_text()),
        "num_targets": evaluation.hyper.facts.get("targets", {}).get("targets", 0),
    }


def write(
    file: pathlib.Path, name: str, experiment: Experiment, workdir: pathlib.Path
) -> pathlib.Path:
    """All finished runs of an experiment, in the order of its table; what another working folder
    recorded of other seeds or runs stays."""
    rows, targets = [], [] if name in WITHOUT_TARGETS else ["--targets TARGETS"]
    recorded = json.loads(file.read_text())["rows"] if file.exists() else []
    for title, run in experiment.runs.items():
        asked = [run.config, json.loads(json.dumps(dict(run.changes))), run.method]
        by_seed = {
            row["seed"]: row
            for row in recorded
            if [row["config"], row["changes"], row.get("method", "generated")] == asked
        }
        for kept in workdir.glob(f"{run_folder(workdir, run, '*').name}/{_row_file(run)}"):
            row = json.loads(kept.read_text())
            by_seed[row["seed"]] = row
        rows += [{**by_seed[seed], "run": title} for seed in sorted(by_seed)]
    content = {
        "name": name,
        "title": experiment.title,
        "command": " ".join(["python tools/experiments.py", name, *targets, "--workdir WORKDIR"]),
        "rows": rows,
        "missing": [run for run in experiment.runs if run not in {row["run"] for row in rows}],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def _empty(folder: pathlib.Path) -> None:
    """Removes all but what is shared with other runs."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.is_symlink():
            path.unlink()


def _share(folder: pathlib.Path, shared: pathlib.Path) -> None:
    for name in SHARED:
        (shared / name).mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to((shared / name).resolve(), target_is_directory=True)


def _brief(row: Mapping[str, Any]) -> str:
    identity, error = row["identity_top1"], row["image_error"]
    return (
        f"identity {identity['mean']:.3f} ± {identity['stderr']:.3f}, error {error['mean']:.4f}, "
        f"strength {row['strength']:g}, {row['cpu_seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
