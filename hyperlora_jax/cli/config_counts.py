"""Counts that a config leaves open, or that its folder of pictures cannot have, settled by what is
there: how many subjects are trained on and held out, batch, steps.

A count that was given on the command line is never changed: one that cannot be is an error.
"""

import sys

from ml_collections import ConfigDict

from hyperlora_jax.array_types import Json
from hyperlora_jax.cli.config import GIVEN, flatten
from hyperlora_jax.errors import UserError

HELD_OUT = 5  # one in so many subjects is kept for `evaluate`
FEWEST_FOR_HOLDING_OUT = 3
EPOCHS, LEAST_STEPS, MOST_STEPS = 200, 1000, 100_000
LARGEST_BATCH = 16
COUNTS = ("data.num_identities", "distill.num_concepts", "train.batch_size", "train.num_steps")
MOST_CONCEPTS = 256  # LoRAs that `distill` fits unasked


def settle(config: ConfigDict, command: str, num_devices: int) -> list[str]:
    """Settles the counts of a config of `distill`, `train` or `pretrain` and adds their keys to
    `given`; returns lines that say what a user may want to know.

    Raises:
        UserError: a count was given that the folder does not have, or no pictures are there.
    """
    if config.data.get("source", "avatars") in ("", "avatars"):
        return []
    if command == "train" and config.model.encoder == "avatar":
        print(
            "model.encoder: the shipped `avatar` encoder knows drawings only; for photographs name "
            "a CLIP folder or an .onnx file by --config.model.encoder",
            file=sys.stderr,
        )
    given = set(config.get(GIVEN, ()))
    values = flatten(config)
    wanted = {"data.num_identities"}
    if command == "distill":
        wanted = {"data.num_identities", "distill.num_concepts"}
    left = [key for key in COUNTS if key in values and not values[key]]
    if not (wanted & set(values)) - given and not left:
        return []  # as where a run goes on: no look at its pictures
    available = _num_subjects(config)
    lines: list[str] = []
    settled = _identities(config, given, available, command, lines)
    count = int(settled.get("data.num_identities") or config.data.num_identities)
    if "distill" in config:
        settled |= _concepts(config.distill, given, count, available)
    if command == "train":
        settled |= _batches(config, count, num_devices)
    for key, value in settled.items():
        section, name = key.split(".")
        with config[section].ignore_type():
            config[section][name] = value
    with config.unlocked():
        config[GIVEN] = tuple(sorted(given | set(settled)))
    return lines


def _num_subjects(config: ConfigDict) -> int:
    """How many subjects there are."""
    from hyperlora_jax.pictures.size_buckets import square
    from hyperlora_jax.subjects.concept_sources import list_concepts

    skip = config.data.get("skip_damaged", False)
    size = config.data.get("size") or 512  # any: no picture is read
    return len(list_concepts(config.data.source, square(size), skip_damaged=skip))


def _identities(
    config: ConfigDict, given: set[str], available: int, command: str, lines: list[str]
) -> dict[str, int]:
    source, count = config.data.source, config.data.get("num_identities")
    if "data.num_identities" in given and count:
        if count > available:
            raise UserError(
                f"--config.data.num_identities={count}: {source} has {available} subjects"
            )
        return {}
    if "num_identities" not in config.data:
        return {}
    if command == "pretrain":
        return {"data.num_identities": min(count or available, available)}
    held = max(available // HELD_OUT, 1) if available >= FEWEST_FOR_HOLDING_OUT else 0
    count = min(count or available, available - held)
    text = f"{available - count} held out for `hyperlora evaluate`"
    if count == available:
        text = "none held out, so that nothing can be evaluated on strangers"
    lines.append(f"{source}: {available} subjects, {count} to train on, {text}")
    return {"data.num_identities": count}


def _concepts(section: ConfigDict, given: set[str], count: int, available: int) -> dict[str, int]:
    wanted = section.num_concepts
    if "distill.num_concepts" not in given or not wanted:
        return {"distill.num_concepts": min(wanted or MOST_CONCEPTS, count)}
    if wanted > available:
        raise UserError(f"--config.distill.num_concepts={wanted}: there are {available} subjects")
    return {}


def _batches(config: ConfigDict, count: int, num_devices: int) -> Json:
    from hyperlora_jax.parallel.mesh import resolve_axes

    section, settled = config.train, {}
    data, fsdp, _ = resolve_axes(num_devices, **config.mesh)
    parts = 1 if section.batch_per_device else data * fsdp
    batch = section.batch_size
    if not batch:
        batch = settled["train.batch_size"] = max(min(count, LARGEST_BATCH) // parts, 1) * parts
    if not section.num_steps:
        steps = EPOCHS * count // (batch * (data * fsdp if section.batch_per_device else 1))
        settled["train.num_steps"] = min(max(steps, LEAST_STEPS), MOST_STEPS)
    return settled
