"""A generated LoRA, a few steps later: rank-relaxed refinement on the subject's own pictures.

    refined = generated + new,   new of rank r₂, zero at first, fitted for 25 to 50 steps

The generated LoRA stays frozen (HyperDreamBooth, arXiv 2307.06949, section 4.3). Both are joined
exactly (rank r₁ + r₂) or cut to a rank by SVD. Many users are refined at once, each in a slot
(`distill/fit.py`).
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.distill.fit import Base, ConceptArrays, Concepts, Plan, fit_loras
from hyperlora_jax.distill.parametrisations import Added, Factors
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.encoders import stored_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors, gauge
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.lora_files import load_lora, read_metadata, save_lora
from hyperlora_jax.lora_files.convert import is_one_lora
from hyperlora_jax.lora_files.header import carried
from hyperlora_jax.pictures import pictures, size_buckets
from hyperlora_jax.pictures.image_folder import SubjectFolder, open_image_folder, read_concept
from hyperlora_jax.stable_diffusion.embedded import image_size
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.subjects.encoded_subjects import encode_subjects
from hyperlora_jax.train.hypernetwork.hypernet_training import family

NUM_STEPS = 25
RECIPE = Recipe(num_steps=NUM_STEPS, images_per_step=4, learning_rate=1e-2)
MAX_SLOTS = 16


@dataclasses.dataclass(frozen=True)
class Refinement:
    """How LoRAs are refined.

    Attributes:
        rank: r₂, of what is added.
        keep_rank: cut the sum to this rank; None keeps it exactly.
    """

    recipe: Recipe = RECIPE
    rank: int = 4
    keep_rank: int | None = None
    seed: int = 0


def refine_loras(
    sd: StableDiffusion,
    spec: LoraSpec,
    loras: Sequence[Params] | Params,
    load: Callable[[int], ConceptArrays],
    how: Refinement = Refinement(),
    *,
    num_slots: int = MAX_SLOTS,
    max_images: int | None = None,
    progress: str | None = "refine",
) -> tuple[Params, LoraSpec]:
    """Refines a batch of LoRAs.

    Args:
        sd: the base model.
        spec: sites of the LoRAs.
        loras: single LoRAs, or a tree with leading axis l.
        load: number of a LoRA → (latents [m, h, w, c], prompt embeddings) of its m pictures.
        num_slots: how many are refined at once.
        max_images: most pictures that one of them has; None: as many as the first.

    Returns:
        LoRA tree with leading axis l, on the host, and its spec.

    Raises:
        UserError: see `fit_loras`; a rank below 1.
    """
    recipe, rank, keep_rank = how.recipe, how.rank, how.keep_rank
    if rank < 1 or (keep_rank is not None and keep_rank < 1):
        raise UserError(f"refine: ranks must be at least 1. Got: {rank=} and {keep_rank=}")
    singles = list(loras) if isinstance(loras, Sequence) else _unstacked(loras)
    added = Factors(spec.with_rank(rank), recipe.alpha, recipe.init_seed)
    parametrisation = Added(spec, added)
    fitted = fit_loras(
        Base(sd.unet, sd.frozen_unet, sd.schedule),
        parametrisation,
        recipe,
        Concepts(range(len(singles)), load, lambda number: singles[number], max_images),
        Plan(num_slots, steps_per_call=recipe.num_steps, seed=how.seed, progress=progress),
    )
    done = {result.index: result.lora for result in fitted}
    joined, joint_spec = [done[k] for k in range(len(singles))], parametrisation.spec
    if keep_rank is not None:
        # One by one: two large batched QR decompositions at once can hang on a CPU.
        joined = [gauge.truncate(lora, joint_spec, keep_rank)[0] for lora in joined]
        joint_spec = joint_spec.with_rank(keep_rank)
    return jax.device_get(factors.stack(joined)), joint_spec


def _unstacked(loras: Params) -> list[Params]:
    count = factors.num_loras(loras)
    if count is None:
        return [loras]
    return [factors.index(loras, k) for k in range(count)]


def refine_files(
    sd: StableDiffusion,
    base: str,
    lora: str | Path,
    images: str | Path,
    out: str | Path,
    how: Refinement = Refinement(),
    *,
    caption: str = "",
    encoder: str | Path | None = None,
    **writing: Any,
) -> list[Path]:
    """Refines one LoRA file on a folder of pictures, or every `NAME.safetensors` or adapter folder
    NAME of a folder on the pictures of IMAGES/NAME; `writing` goes to `save_lora`.

    Args:
        base: name of the base model, for the header.
        caption: prompt of pictures whose folder has no metadata.jsonl.
        encoder: path of the condition encoder that the LoRAs must have been generated with.

    Raises:
        UserError: a file, folder or picture that cannot be used, LoRAs with different sites or
            generated with another encoder.
    """
    source, folder = Path(lora), Path(images)
    many = source.is_dir() and not is_one_lora(source)
    candidates = sorted(source.iterdir()) if many else [source]
    files = [file for file in candidates if not many or _is_lora(file)]
    if not files:
        raise UserError(f"{source}: holds no LoRA file or adapter folder, expected LoRAs to refine")
    if encoder is not None:
        _check_encoder(files, encoder)
    read = [load_lora(file, sd) for file in files]
    spec = read[0][1]
    if text := [site.path for site in spec.sites if site.component != "unet"]:
        raise UserError(
            f"{files[0]}: refining trains UNet layers only, and this has {len(text)} of text "
            f"encoders (first {text[0]}); leave them out by convert --drop "
            + " ".join(sorted({path.split(".")[0] for path in text}))
        )
    for file, (_, other) in zip(files, read, strict=True):
        if other.fingerprint != spec.fingerprint:
            raise UserError(
                f"{file}: has spec {other.fingerprint[:12]}, {files[0].name} has "
                f"{spec.fingerprint[:12]}; LoRAs that are refined together share their sites"
            )
    subjects = _subjects(folder, files) if many else [_subject(folder, files[0])]
    concepts = [_concept(sd, subject, caption) for subject in subjects]
    refined, joint = refine_loras(
        sd,
        spec,
        [single for single, _ in read],
        lambda number: concepts[number],
        how,
        num_slots=min(len(files), MAX_SLOTS),
        max_images=max(len(latents) for latents, _ in concepts),
    )
    written = []
    for k, file in enumerate(files):
        header = carried(read_metadata(file))
        facts = {"base": base, "base_hash": sd.base_hash, "refined_steps": how.recipe.num_steps}
        path = Path(out) / file.name if many else Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            written.append(
                save_lora(
                    path,
                    factors.index(refined, k),
                    joint,
                    family=family(sd),
                    metadata={**header, **facts},
                    **writing,
                )
            )
        except OSError as error:
            raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error
    return written


def _is_lora(path: Path) -> bool:
    lora = is_one_lora(path) if path.is_dir() else path.suffix.lower() == ".safetensors"
    return lora and not path.name.startswith(".")


def _check_encoder(files: Sequence[Path], encoder: str | Path) -> None:
    for file in files:
        metadata = read_metadata(file)
        if "hyperlora.encoder_hash" not in metadata:
            raise UserError(
                f"{file}: its header names no condition encoder, so --encoder {encoder} cannot be "
                "compared; leave it out"
            )
        record = json.loads(metadata.get("hyperlora.encoder", "{}"))
        identity = {"name": "of its header", **record, "hash": metadata["hyperlora.encoder_hash"]}
        stored_encoder.read(str(file), identity, encoder)


def _subject(folder: Path, file: Path) -> SubjectFolder:
    folders = open_image_folder(folder)
    if len(folders) != 1:
        raise UserError(
            f"{folder}: holds {len(folders)} folders of pictures, but {file.name} is one LoRA; "
            "expected the pictures of one subject"
        )
    return folders[0]


def _subjects(folder: Path, files: Sequence[Path]) -> list[SubjectFolder]:
    """The sub-folder that belongs to every LoRA, by name."""
    named = {own.name: own for own in open_image_folder(folder) if own.path != folder}
    names = {file: file.name if file.is_dir() else file.stem for file in files}
    if missing := [file for file in files if names[file] not in named]:
        raise UserError(
            f"{folder}: has no folder {names[missing[0]]!r} with the pictures of {missing[0]}; "
            f"expected one per LoRA, {len(missing)} of {len(files)} are missing"
        )
    return [named[names[file]] for file in files]


def _concept(sd: StableDiffusion, subject: SubjectFolder, caption: str) -> ConceptArrays:
    """(latents, prompt embeddings) of a subject's target pictures."""
    read = read_concept(subject, size_buckets.square(image_size(sd)), caption)
    images = np.stack([pictures.decode(png) for png in read.targets])[None]
    encoded = encode_subjects(sd, [read.id], images, [read.captions])
    return encoded.concept(0)
