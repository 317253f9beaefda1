"""`hyperlora train`: pictures (and LoRA targets) → hypernetwork.

    pictures ─► latents, text states, condition embeddings ─┐
    LoRA targets ─► vectors in a gauge (─► VAE latents) ─────┴► training loop ─► hypernetwork/

The frozen models run once over all pictures; the result is kept in the workdir. The base is read,
and its autoencoder and text encoder run, only where a loss needs it. Baselines (mean, nearest, knn,
ridge, pca_gaussian) are fitted in closed form instead of trained.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import Params
from hyperlora_jax.data.encoded_subjects import EncodedSubjects
from hyperlora_jax.data.pipelines import check_numbers, subject_batches
from hyperlora_jax.data.ragged import Ragged
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet import familiarity
from hyperlora_jax.hypernet.baselines import BASELINES, Fitted
from hyperlora_jax.hypernet.building import architecture, build_generator, with_remat
from hyperlora_jax.hypernet.conditioning import configured_encoder
from hyperlora_jax.hypernet.generators import Generator
from hyperlora_jax.hypernet.model import FOLDER, Hypernetwork
from hyperlora_jax.hypernet.objectives import ObjectiveWeights
from hyperlora_jax.hypernet.weight_diffusion import Diffusion
from hyperlora_jax.hypernet.weight_vae import Latents
from hyperlora_jax.parallel import multihost, sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.stable_diffusion import packed_text
from hyperlora_jax.stable_diffusion.embedded import image_size, load_base, outline_base
from hyperlora_jax.train.configured import arithmetic_dtype, fit_section
from hyperlora_jax.train.hypernet_data import TrainingTargets, read_encoded, read_targets
from hyperlora_jax.train.hypernet_task import Base, Phase, hypernet_task
from hyperlora_jax.train.loop import open_workdir
from hyperlora_jax.train.vae_training import train_vae


def train_hypernetwork(config: Any, workdir: epath.PathLike) -> Hypernetwork:
    """Trains as `configs/avatars.py` describes; writes and returns the hypernetwork.

    Raises:
        UserError: bad config values, a LoRA-target dataset of another base or spec, an unusable
            workdir; see also `train.loop.fit`.
    """
    workdir = open_workdir(workdir)
    scratch = storage.scratch(workdir)
    mesh = make_mesh(**config.mesh)
    section, model = config.train, architecture(config.model)
    phases = make_phases(section)
    fitted = config.model.generator in BASELINES
    needs_base = not fitted and any(phase.weights.need_base for phase in phases)
    if needs_base:
        sd = load_base(config.base, arithmetic_dtype(section))
    else:
        sd = outline_base(config.base)
    encoder = configured_encoder(config.model)
    check_numbers(section.num_references, section.images_per_subject)
    spec = sd.lora_spec(config.model.preset, config.model.rank)
    generator = build_generator(spec, with_remat(model, section.remat))
    needs_texts = needs_base and any(phase.weights.end_to_end for phase in phases)
    encoded, pictures_facts = read_encoded(
        config, workdir, scratch, sd, encoder, latents=needs_base, texts=needs_texts
    )
    conditions = encoded.references
    assert conditions is not None
    facts = {
        "base": config.base,
        "base_hash": sd.base_hash,
        "family": family(sd),
        "spec": spec.fingerprint,
        "encoder": encoder.hash,
        "model": model,
        "data": pictures_facts,
    }
    targets, constants = None, {}
    if generator.needs_targets or any(phase.weights.need_targets for phase in phases):
        targets = read_targets(config, workdir / "targets", scratch, spec, sd.base_hash, encoded)
        facts["targets"] = targets.facts
        constants = {"mean": targets.mean, "std": targets.std}
    stored = {
        **facts,
        "num_steps": section.num_steps,
        "trained_on": list(encoded.ids),
        "generate": generate_defaults(config.generate),
    }
    if isinstance(generator, Fitted):
        hyper = _fitted(generator, encoder, conditions, targets, stored, model)
        return _saved(hyper, workdir)
    if isinstance(generator, Diffusion) and isinstance(generator.codec, Latents):
        constants = train_vae(
            generator.codec,
            constants,
            targets.rows,
            targets.subjects,
            section.vae,
            workdir=section.vae.workdir or workdir / "vae",
            mesh=mesh,
            seed=section.seed,
            batch_size=_global_batch(section.vae.batch_size, section, mesh),
            facts={**facts, "model": {"vae": model["vae"]}},  # all that a VAE depends on
            config=config,
        )
    frozen: Params = {"constants": constants} if constants else {}
    if needs_base:
        frozen["unet"] = sd.params["unet"]
    if any(phase.weights.prior for phase in phases):
        picture = (image_size(sd),) * 2
        frozen["prior_text"] = np.asarray(
            packed_text.encode(sd, [section.prior_caption], picture)[0]
        )
    task = hypernet_task(
        generator,
        frozen,
        _batches(section, mesh, encoded, targets, _targets_until(generator, phases)),
        phases=phases,
        condition_shapes=(
            conditions.arrays["pooled"].shape[1:],
            conditions.arrays["tokens"].shape[1:],
        ),
        base=Base(
            sd.unet.clone(mesh=mesh, remat=section.remat), sd.schedule, section.min_snr_gamma
        ),
        facts=facts,
        num_images=section.images_per_subject if "unet" in frozen else 0,
    )
    trained = fit_section(
        task, section, workdir=workdir, mesh=mesh, seed=section.seed, config=config
    )
    params = sharding.gather(trained, mesh)
    kept = {**(constants if generator.needs_targets else {}), **_known(conditions)}
    return _saved(Hypernetwork(generator, params, encoder, stored, model, kept), workdir)


def _saved(hyper: Hypernetwork, workdir: epath.Path) -> Hypernetwork:
    if multihost.is_first():
        hyper.save(workdir / FOLDER)
    return hyper


def _targets_until(generator: Generator, phases: Sequence[Phase]) -> int | None:
    """The step from which on no loss looks at target LoRAs, so that everyone can be trained on."""
    if generator.needs_targets or phases[-1].weights.need_targets:
        return None
    return phases[0].until


def _global_batch(batch_size: int, section: Any, mesh: Any) -> int:
    """Subjects a step over all devices, of which the config may name one device's."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return batch_size * parts if section.batch_per_device else batch_size


def _batches(
    section: Any,
    mesh: Any,
    encoded: EncodedSubjects,
    targets: TrainingTargets | None,
    targets_until: int | None,
):
    return subject_batches(
        encoded.references,
        encoded.targets,
        batch_size=_global_batch(section.batch_size, section, mesh),
        seed=section.seed,
        num_references=section.num_references,
        num_targets=section.images_per_subject,
        per_subject={} if targets is None else {"target": targets.rows},
        subjects=None if targets is None else targets.subjects,
        subjects_until=targets_until,
        order=None if targets is None else targets.order(section.seed),
        **sharding.host_part(mesh),
    )


def _fitted(
    generator: Fitted,
    encoder: Any,
    conditions: Ragged,
    targets: TrainingTargets | None,
    facts: dict[str, Any],
    model: dict[str, Any],
) -> Hypernetwork:
    """A baseline, fitted on the mean embedding of every subject's references."""
    assert targets is not None
    means, rows = conditions.means("pooled")[targets.subjects], targets.rows.of(targets.subjects)
    constants = generator.fit(means, rows) | _known(conditions)
    return Hypernetwork(generator, {}, encoder, facts, model, constants)


def _known(conditions: Ragged) -> Params:
    """Who the training subjects were. Compares them all: at the end, not before the first step."""
    found = familiarity.fit(conditions.means("pooled"), conditions.first("pooled"))
    return {"familiarity": found}


def make_phases(section: Any) -> tuple[Phase, ...]:
    """The phases of a config's `train` section: `warm_up.objectives` for `warm_up.num_steps`
    steps, then `objectives`.

    Raises:
        UserError: an unknown objective, or weights that cannot be.
    """
    main = Phase(_weights("objectives", section.objectives))
    if not section.warm_up.num_steps:
        return (main,)
    first = _weights("warm_up.objectives", section.warm_up.objectives)
    return Phase(first, section.warm_up.num_steps), main


def generate_defaults(section: Any) -> dict[str, Any]:
    """What `hyperlora generate` uses unless told otherwise, from a config's `generate` section."""
    return dict(section)


def family(sd: Any) -> str:
    """ "sd1", "sd2" or "sdxl": whose names a LoRA file for this base carries.

    A base of other sizes counts as the one whose building blocks it shares.
    """
    if sd.unet.settings.addition_time_width is not None:
        return "sdxl"
    return "sd2" if sd.unet.settings.use_linear_projection else "sd1"


def _weights(name: str, section: Any) -> ObjectiveWeights:
    try:
        return ObjectiveWeights(**dict(section))
    except (TypeError, ValueError) as error:
        raise UserError(f"config.train.{name}: {error}") from error
