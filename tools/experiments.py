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
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ("renders", "cache", "encoded")  # folders that all runs of a dataset can share
PAPER = "configs/paper.py"
AVATARS = "configs/avatars.py"


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of an experiment: a config file, what is changed in it, and the method (of
    `evaluate/method_loras.py`) whose LoRAs are scored. Rows of one training are its methods."""

    config: str = AVATARS
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: str = "generated"


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


def _references() -> dict[str, Run]:
    steps = {"train.num_steps": 3000}
    several = {**steps, "train.num_references": (1, 8)}
    runs = {"trained with 1, told by 1": Run(changes=steps)}
    for count in (1, 2, 4, 8):
        method = f"generated_{count}" if count > 1 else "generated"
        runs[f"trained with 1 to 8, told by {count}"] = Run(changes=several, method=method)
    return runs


def _conventional() -> dict[str, Run]:
    """What the yardstick's recipe is chosen by: its own scores on validation identities. The few
    test identities only fill the table's columns."""
    asked = {
        "train.num_steps": 1,  # an evaluation belongs to a checkpoint, whatever it is like
        "evaluate.conventional.num_validation": 32,
        "evaluate.num_validation": 32,
        "evaluate.conventional.num_identities": 8,
    }
    recipe = "evaluate.conventional.recipe"
    return {
        f"{steps} steps, learning rate {rate:g}": Run(
            changes={**asked, f"{recipe}.num_steps": steps, "distill.recipe.learning_rate": rate},
            method="conventional",
        )
        for steps in (150, 300, 600)
        for rate in (0.003, 0.01, 0.02)
    }


EXPERIMENTS = {
    "conventional": Experiment("The best conventional recipe", _conventional()),
    "gauges": Experiment("Which form of a LoRA is learned best?", _gauges()),
    "num_targets": Experiment("How many LoRA targets are enough?", _num_targets()),
    "num_subjects": Experiment("How many subjects are enough?", _num_subjects()),
    "compute": Experiment("How long should a hypernetwork train on pictures?", _compute()),
    "references": Experiment("What do more pictures of a subject tell?", _references()),
    "objectives": Experiment("Objective and generator", _objectives()),
    "paper": Experiment("The paper's grid (arXiv 2412.02352)", _paper_grid()),
}

WITHOUT_TARGETS = ("conventional", "references", "compute")


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
    asked = {"config": run.config, "changes": dict(run.changes), "method": run.method, "seed": seed}
    row = {"run": name, **asked, **measure(config, folder, run.method)}
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(json.dumps(row, indent=1))
    temporary.replace(kept)
    return row


def run_folder(workdir: pathlib.Path, run: Run, seed: int | str) -> pathlib.Path:
    """WORKDIR/DIGEST-SEED: the digest is of what is run, whatever experiment it belongs to."""
    asked = json.dumps([run.config, dict(run.changes)], sort_keys=True)
    return workdir / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}-{seed}"


def _row_file(run: Run) -> str:
    return "row.json" if run.method == "generated" else f"row-{run.method}.json"


def measure(config: Any, folder: pathlib.Path, method: str = "generated") -> dict[str, Any]:
    """Trains one config, if that is not done yet, and scores it on the held-out identities."""
    from hyperlora_jax.evaluate.evaluation import Evaluation
    from hyperlora_jax.train.hypernetwork.hypernet_training import train_hypernetwork

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
    curve = [point["identity_top1"]["mean"] for point in chosen["validation"]]
    return {
        **{
            score: summary[score][method]
            for score in ("identity_top1", "image_error", "caption_accuracy", "diversity")
        },
        "strength": chosen["best"],
        "validation_top1": max(curve, default=None),
        "guidance": chosen.get("guidance", 1.0),
        "steps": config.train.num_steps if evaluation.hyper.params else 0,
        **json.loads(timed.read_text()),
        "num_targets": evaluation.hyper.facts.get("targets", {}).get("targets", 0),
    }


def write(
    file: pathlib.Path, name: str, experiment: Experiment, workdir: pathlib.Path
) -> pathlib.Path:
    """All finished runs of an experiment, in the order of its table."""
    rows, targets = [], [] if name in WITHOUT_TARGETS else ["--targets TARGETS"]
    for title, run in experiment.runs.items():
        for kept in sorted(workdir.glob(f"{run_folder(workdir, run, '*').name}/{_row_file(run)}")):
            rows.append({**json.loads(kept.read_text()), "run": title})
    content = {
        "name": name,
        "title": experiment.title,
        "command": " ".join(["python tools/experiments.py", name, *targets, "--workdir WORKDIR"]),
        "rows": rows,
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
