"""`hyperlora distill`: pictures per concept → LoRA-target dataset.

    pictures ─► latents, text states ─► many LoRAs at once ─► spool/ ─► targets/

A finished LoRA is one file of the spool, written whole or not at all. A restarted run fits what the
spool lacks; the dataset is made of the spool in one final step. What both are made of is kept with
them and compared (`record.py`): another run is refused, more concepts are fitted besides those that
are there. A concept whose fit is not finite goes to quarantine, the others go on. Concepts whose
pictures have one size (`distill.buckets`) are fitted together, one size after another: one program
for each.

Of several processes each fits its share of the concepts on its own devices, with one spool for all;
they meet at the end, where the first one makes the dataset.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.distill import finished, record
from hyperlora_jax.distill.finished import Distilled
from hyperlora_jax.distill.fit import (
    Base,
    ConceptArrays,
    Concepts,
    FittedLora,
    Plan,
    fit_loras,
)
from hyperlora_jax.distill.prior import class_pictures
from hyperlora_jax.distill.record import Record, There, compare
from hyperlora_jax.distill.reference_embeddings import ReferenceEmbeddings
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.parallel import multihost, sharding
from hyperlora_jax.parallel.shared_work import local_mesh
from hyperlora_jax.pictures import size_buckets
from hyperlora_jax.pictures.subjects import Subject, split_by_hash
from hyperlora_jax.stable_diffusion.embedded import image_size, load_frozen
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.subjects.encoding_cache import encode_once
from hyperlora_jax.subjects.subject_pictures import (
    SubjectPictures,
    load_in_sizes,
    with_flips,
    with_prompt,
)
from hyperlora_jax.targets.lora_sources import Rejected
from hyperlora_jax.targets.spool import write_finished, write_rejected
from hyperlora_jax.train.loop import open_workdir

CURVE_POINTS = 32


def make_recipe(section: ConfigDict, **overrides: float | str | None) -> Recipe:
    """The recipe of a config's `distill` section.

    Raises:
        UserError: an unknown key.
    """
    try:
        return Recipe(**{"num_steps": section.num_steps, **dict(section.recipe), **overrides})
    except TypeError as error:
        raise UserError(f"config.distill.recipe: {error}") from error


def distill(config: ConfigDict, workdir: epath.PathLike) -> Distilled:
    """Fits the LoRAs of `distill.num_concepts` concepts that WORKDIR/targets lacks, and writes it.

    In a bucket every finished LoRA is copied to WORKDIR/spool at once.

    Raises:
        UserError: an unknown or contradictory setting, pictures that cannot be used
            (`load_in_sizes`), LoRAs of another run in the workdir (`record.compare`), a fit that
            fails (`fit_loras`), not one concept that could be fitted.
    """
    workdir = open_workdir(workdir)
    out = workdir / "targets"
    scratch = storage.scratch(workdir)
    spool = scratch / "spool"
    section = config.distill
    recipe = make_recipe(section)
    _check(section, recipe)
    sd = load_frozen(config.base, jnp.dtype(section.dtype), local_mesh())
    preset, rank = section.preset or config.model.preset, section.rank or config.model.rank
    spec = sd.lora_spec(preset, rank)
    embeddings = ReferenceEmbeddings(section.encoders, image_size(sd))
    groups = multihost.first_then_others("pictures", lambda: _pictures(config, sd, scratch))
    facts = {
        "recipe": dataclasses.asdict(recipe),
        "base": config.base,
        "base_hash": sd.base_hash,
        "spec": spec.fingerprint,
        "preset": preset,
        "rank": rank,
        "dtype": section.dtype,
        "seed": section.seed,
        "splits": section.splits,
        "buckets": section.buckets,
        # A plateau is looked for between two calls only.
        "steps_per_call": section.steps_per_call if recipe.plateau_window else None,
        "prior": section.prior.to_dict() if recipe.prior_weight > 0 else None,
        "pictures": _describe(groups),
        "encoders": embeddings.hashes(),
    }
    asked = Record(facts, _marks(groups), spec.num_parameters)
    there = multihost.first_then_others("record", lambda: _begin(asked, workdir, spool, out))
    if there.complete:
        if multihost.is_first():
            _clear(scratch)
        rows = finished.rejected_of(spool, out)
        rejected = tuple(rows[name] for name in sorted(asked.concepts) if name in there.rejected)
        return Distilled(out, len(asked.concepts), None, rejected, there.notes)
    for pictures in groups:
        for fitted in _fit(config, sd, spec, recipe, pictures, there.done, workdir):
            file = write_finished(spool, _subject(fitted, pictures, spec, section, embeddings))
            storage.push(workdir, f"spool/{file.name}")
    multihost.barrier("fitted", multihost.PATIENCE)
    if multihost.is_first():
        storage.pull(workdir, "spool", missing_only=True)  # what other hosts have fitted
        result = finished.write_dataset(asked, there, spool, out, spec, sd.base_hash, scratch)
        _clear(scratch)
    else:
        result = Distilled(out, len(asked.concepts), 0)  # process 0 says what was written
    multihost.barrier("written", multihost.PATIENCE)
    return result


def _begin(asked: Record, workdir: epath.Path, spool: Path, out: epath.Path) -> There:
    """What is there of this run; its facts are in the spool before the first LoRA is."""
    storage.pull(workdir, "spool", "prior.npz")
    there = compare(asked, spool, out)
    if multihost.is_first() and not there.complete:
        storage.push(workdir, f"spool/{record.write(asked, spool).name}")
    return there


def _marks(groups: Sequence[SubjectPictures]) -> dict[str, str]:
    """{id: mark} of all concepts, in the order of their ids."""
    marks = {
        name: pictures.marks[k] if pictures.marks else ""
        for pictures in groups
        for k, name in enumerate(pictures.ids)
    }
    return dict(sorted(marks.items()))


def _clear(scratch: Path) -> None:
    for unfinished in scratch.glob("slots-*.safetensors"):  # of another number of processes
        unfinished.unlink()


def _check(section: ConfigDict, recipe: Recipe) -> None:
    if section.splits not in ("train", "hash"):
        raise UserError(f"distill.splits: got {section.splits!r}, expected 'train' or 'hash'")
    if recipe.prior_weight > 0 and "prior" not in section:
        raise UserError(
            "distill.recipe: has a prior_weight, but there is no distill.prior section with "
            "prompts, num_images, batch_size, num_steps and guidance"
        )


def _pictures(config: ConfigDict, sd: StableDiffusion, scratch: Path) -> list[SubjectPictures]:
    """All concepts, those of one picture size together; one program serves one size."""
    section, size = config.distill, image_size(sd)
    buckets = size_buckets.square(size)
    if section.buckets:
        levels = sd.unet.settings.num_levels
        buckets = size_buckets.of_one_area(
            size, sd.component("vae").downsampling * 2 ** (levels - 1)
        )
    groups = load_in_sizes(config.data, section.num_concepts, buckets, scratch / "renders")
    if section.flips:
        groups = [with_flips(pictures) for pictures in groups]
    if section.prompt:
        groups = [with_prompt(pictures, section.prompt) for pictures in groups]
    return groups


def _describe(groups: Sequence[SubjectPictures]) -> dict[str, object]:
    """What the pictures were made from; how many concepts have which size where sizes differ."""
    if len(groups) == 1:
        return dict(groups[0].facts)
    sizes = {_size_name(pictures): len(pictures.ids) for pictures in groups}
    shared = {key: value for key, value in groups[0].facts.items() if key != "size"}
    return {**shared, "concepts_by_size": sizes}


def _size_name(pictures: SubjectPictures) -> str:
    height, width = pictures.size
    return f"{width}x{height}"


def _fit(
    config: ConfigDict,
    sd: StableDiffusion,
    spec: LoraSpec,
    recipe: Recipe,
    pictures: SubjectPictures,
    done: Collection[str],
    workdir: epath.Path,
) -> Iterator[FittedLora]:
    """This process's share of the LoRAs of one picture size, without those that are done."""
    section, scratch = config.distill, storage.scratch(workdir)
    share = range(jax.process_index(), len(pictures.ids), jax.process_count())
    state_file = scratch / f"slots-{_size_name(pictures)}{_place()}.safetensors"
    position = {pictures.numbers[k]: k for k in share if pictures.ids[k] not in done}
    left = len({*pictures.ids} - {*done})
    multihost.barrier("next size", multihost.PATIENCE)
    if multihost.agree(f"left/{_size_name(pictures)}", str(left)) == "0":
        state_file.unlink(missing_ok=True)
        return
    mesh = local_mesh()
    encoded = encode_once(workdir, sd, pictures, batch_size=section.encode_batch_size)
    prior = None
    if recipe.prior_weight > 0:
        prior = multihost.first_then_others(
            "prior",
            lambda: class_pictures(
                sharding.on_mesh(sd, mesh), section.prior, section.seed, scratch / "prior.npz"
            ),
        )
        if multihost.is_first():
            storage.push(workdir, "prior.npz")
    if not position:
        state_file.unlink(missing_ok=True)
        return
    storage.pull(workdir, state_file.name)

    def load(number: int) -> ConceptArrays:
        return encoded.concept(position[number])

    def name(number: int) -> str:
        k = position[number]
        return f"{pictures.ids[k]} {pictures.marks[k]}" if pictures.marks else pictures.ids[k]

    def reject(number: int, reason: str) -> None:
        row = Rejected(pictures.ids[position[number]], str(pictures.facts["source"]), reason)
        storage.push(workdir, f"spool/{write_rejected(scratch / 'spool', row).name}")

    few = -(-len(share) // mesh.size) * mesh.size
    yield from fit_loras(
        Base(sd.unet.clone(remat=section.remat, mesh=mesh), sd.frozen_unet, sd.schedule),
        recipe.factors(spec),
        recipe,
        Concepts(list(position), load, None, max(pictures.counts), name, reject),
        Plan(
            num_slots=min(section.num_slots, few),
            steps_per_call=section.steps_per_call,
            seed=section.seed,
            mesh=mesh if mesh.size > 1 else None,
            state_file=state_file,
            save_every_steps=section.save_every_steps,
            on_save=lambda: storage.push(workdir, state_file.name),
            progress=f"distill {_size_name(pictures)}" if multihost.is_first() else None,
        ),
        prior=prior,
    )


def _place() -> str:
    """This process among several, for the name of what only it writes."""
    count = jax.process_count()
    return f"-{jax.process_index()}-of-{count}" if count > 1 else ""


def _subject(
    fitted: FittedLora,
    pictures: SubjectPictures,
    spec: LoraSpec,
    section: ConfigDict,
    embeddings: ReferenceEmbeddings,
) -> Subject:
    k = pictures.numbers.index(fitted.index)
    targets = pictures.targets_png(k)
    references = pictures.references[k] or targets
    every = max(1, len(fitted.losses) // CURVE_POINTS)
    usable = len(fitted.losses) // every * every
    identity = pictures.identities[k]
    return Subject(
        id=pictures.ids[k],
        identity=identity,
        references=references,
        targets=targets,
        captions=pictures.captions[k],
        embeddings=embeddings.of(references),
        lora=np.asarray(vectorize.flatten(fitted.lora, spec), np.float32),
        seed=section.seed,
        num_steps=len(fitted.losses),
        loss_curve=fitted.losses[:usable].reshape(-1, every).mean(axis=1),
        split="train" if section.splits == "train" else split_by_hash(identity),
    )
