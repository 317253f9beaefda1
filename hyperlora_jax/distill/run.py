"""`hyperlora distill`: pictures per concept → LoRA-target dataset.

    pictures ─► latents, text states ─► many LoRAs at once ─► spool/ ─► targets/

A finished LoRA is one file of the spool, written whole or not at all. A restarted run fits what the
spool lacks; the dataset is made of the spool in one final step.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hyperlora_jax.data.encoded_subjects import encode_subjects
from hyperlora_jax.data.lora_targets_writer import write_lora_targets
from hyperlora_jax.data.spool import Spool, finished_ids, write_finished
from hyperlora_jax.data.subject_pictures import (
    SubjectPictures,
    load_pictures,
    with_flips,
    with_prompt,
)
from hyperlora_jax.data.subjects import Subject, split_by_hash
from hyperlora_jax.distill.fit import FittedLora, fit_loras
from hyperlora_jax.distill.prior import class_pictures
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.stable_diffusion.embedded import image_size, load_base
from hyperlora_jax.train.loop import open_workdir

CURVE_POINTS = 32


def make_recipe(section: Any, **overrides: Any) -> Recipe:
    """The recipe of a config's `distill` section.

    Raises:
        UserError: an unknown key.
    """
    try:
        return Recipe(**{"num_steps": section.num_steps, **dict(section.recipe), **overrides})
    except TypeError as error:
        raise UserError(f"config.distill.recipe: {error}") from error


def distill(config: Any, workdir: str | Path) -> Path:
    """Fits `distill.num_concepts` LoRAs and writes WORKDIR/targets; returns that folder."""
    workdir = Path(str(open_workdir(workdir)))
    out = workdir / "targets"
    if (out / "metadata.json").exists():
        return out
    section = config.distill
    if section.splits not in ("train", "hash"):
        raise UserError(f"distill.splits: got {section.splits!r}, expected 'train' or 'hash'")
    if make_recipe(section).prior_weight > 0 and "prior" not in section:
        raise UserError(
            "distill.recipe: has a prior_weight, but there is no distill.prior section with "
            "prompts, num_images, batch_size, num_steps and guidance"
        )
    sd = load_base(config.base, jnp.dtype(section.dtype))
    size = image_size(sd)
    unet = sd.unet.clone(remat=section.remat)
    spec = sd.lora_spec(section.preset, section.rank)
    recipe = make_recipe(section)
    pictures = load_pictures(config.data, section.num_concepts, size, workdir / "renders")
    if section.flips:
        pictures = with_flips(pictures)
    if section.prompt:
        pictures = with_prompt(pictures, section.prompt)
    spool = workdir / "spool"
    facts = {
        "recipe": dataclasses.asdict(recipe),
        "base": config.base,
        "dtype": section.dtype,
        "seed": section.seed,
        "pictures": dict(pictures.facts),
    }
    done = finished_ids(spool)
    numbers = [i for i in range(section.num_concepts) if pictures.ids[i] not in done]
    if numbers:
        wanted = np.asarray(numbers)
        encoded = encode_subjects(
            sd,
            None,
            [pictures.ids[i] for i in numbers],
            pictures.images[wanted],
            [pictures.captions[i] for i in numbers],
        )
        position = {number: k for k, number in enumerate(numbers)}
        mesh = make_mesh(**config.mesh)
        prior = None
        if recipe.prior_weight > 0:
            prior = class_pictures(sd, section.prior, section.seed, workdir / "prior.npz")
        for fitted in fit_loras(
            unet.clone(mesh=mesh),
            sd.params["unet"],
            sd.schedule,
            spec,
            recipe,
            numbers,
            lambda number: encoded.concept(position[number]),
            num_slots=min(section.num_slots, section.num_concepts)
            if mesh.size == 1
            else section.num_slots,
            steps_per_call=section.steps_per_call,
            seed=section.seed,
            mesh=mesh if mesh.size > 1 else None,
            state_file=workdir / "slots.safetensors",
            save_every_steps=section.save_every_steps,
            prior=prior,
        ):
            subject = _subject(fitted, pictures, spec, section.seed)
            if section.splits == "hash":
                subject = dataclasses.replace(subject, split=split_by_hash(subject.identity))
            write_finished(spool, subject)
    return write_lora_targets(
        out,
        Spool(spool),
        spec,
        sd.base_hash,
        facts=facts,
        split_of=lambda identity: "train",
        overwrite=True,
    )


def _subject(fitted: FittedLora, pictures: SubjectPictures, spec: LoraSpec, seed: int) -> Subject:
    png = pictures.png(fitted.index)
    every = max(1, len(fitted.losses) // CURVE_POINTS)
    usable = len(fitted.losses) // every * every
    return Subject(
        id=pictures.ids[fitted.index],
        identity=pictures.identities[fitted.index],
        references=png,
        targets=png,
        captions=pictures.captions[fitted.index],
        lora=np.asarray(vectorize.flatten(fitted.lora, spec), np.float32),
        seed=seed,
        num_steps=len(fitted.losses),
        loss_curve=fitted.losses[:usable].reshape(-1, every).mean(axis=1),
        split="train",
    )
