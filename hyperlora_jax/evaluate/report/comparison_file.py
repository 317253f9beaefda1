"""The comparison as one small JSON: scores of every method, steps and seconds per new identity.

{"methods": {name: {"identity_top1": {"mean", "stderr", "n"}, "image_error": {…},
 "caption_accuracy": {…}, "strength", "guidance", "steps", "seconds"}},
 "differences": {…}, "memorisation": {…}, "confidence": {…}, "command", "seeds", …}
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperlora_jax.array_types import Json
from hyperlora_jax.distill.parametrisations import Added
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.fitted_sets import seconds_per_fit
from hyperlora_jax.lora import factors

NAMES = {"conventional": "conventional_all"}  # in the table one needs not say of how many
SCORES = ("identity_top1", "image_error", "similarity", "caption_accuracy")


def comparison(
    summary: Json,
    steps: Mapping[str, int],
    seconds: Mapping[str, float | None],
    command: str,
    seeds: Mapping[str, int],
) -> Json:
    """The content of the file.

    Args:
        summary: of `summary.summarise`.
        steps: optimiser steps per new identity, by method.
        seconds: per new identity, by method; None where nothing is computed.
        command: what makes the file again.
        seeds: {"identity_seed", "train_seed", …}.
    """
    methods = {}
    for name in summary["identity_top1"]:
        chosen = summary["strength"][name]
        methods[NAMES.get(name, name)] = {
            **{score: summary[score][name] for score in SCORES if score in summary},
            "strength": chosen["best"],
            "strength_curve": chosen["validation"],
            "guidance": chosen.get("guidance", 1.0),
            "steps": steps.get(name, 0),
            "seconds": seconds.get(name),
        }
    differences = {NAMES.get(name, name): values for name, values in summary["differences"].items()}
    return {
        "methods": methods,
        "generated_minus": differences,
        "paired": summary["paired"],
        "memorisation": summary.get("memorisation", {}),
        "confidence": summary.get("confidence", {}),
        "command": command,
        "seeds": dict(seeds),
        "evaluation": summary["evaluation"],
        "versions": summary["versions"],
        "facts": {k: v for k, v in summary["facts"].items() if k != "config"},
    }


def measured(evaluation: Any, summary: Json, command: str) -> Json:
    """The comparison of a finished `run.Evaluation`, with the seconds that every method's LoRA
    takes alone.

    Args:
        summary: of its report.
        command: what makes the file again.
    """
    names = [name for name in summary["identity_top1"] if name not in ("exact", "copy_reference")]
    sources, fitted = evaluation.sources(names), evaluation.context.fitted
    spec, config = evaluation.spec, evaluation.config
    seconds: dict[str, float | None] = {}
    for name, source in sources.items():
        if source.hyper is not None:
            seconds[name] = evaluation.seconds_per_lora(source.hyper, source.num_views)
        elif name.startswith("conventional"):
            seconds[name] = evaluation.seconds["fit_one_lora"]
        elif name.startswith("refined"):
            recipe = dataclasses.replace(fitted.refine_recipe, num_steps=source.steps)
            trained = Added(spec, recipe.factors(spec.with_rank(fitted.refine_rank)))
            zero = factors.zeros(spec)
            took = seconds_per_fit(evaluation.sd, spec, recipe, evaluation.test, trained, zero)
            seconds[name] = took + evaluation.seconds["generate_one_lora"]
    seeds = {
        "identity_seed": config.evaluate.identity_seed,
        "train_seed": config.train.seed,
        "distill_seed": config.distill.seed,
    }
    steps = {name: source.steps for name, source in sources.items()}
    return comparison(summary, steps, seconds, command, seeds)


def write(path: str | Path, content: Mapping[str, object]) -> Path:
    """Writes the file.

    Raises:
        UserError: it cannot be written.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error
    return file
