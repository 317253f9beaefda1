"""`hyperlora train`: pictures (and LoRA targets) → hypernetwork.

    pictures ─► latents, text states, condition embeddings ─┐
    LoRA targets ─► vectors in a gauge (─► VAE latents) ─────┴► training loop ─► hypernetwork/

The frozen models run once over all pictures; the result is kept in the workdir. The base is read,
and its autoencoder and text encoder run, only where a loss needs it. Baselines (mean, nearest, knn,
ridge, pca_gaussian) are fitted in closed form instead of trained.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json, Params
from hyperlora_jax.batches.pipelines import check_numbers, subject_batches
from hyperlora_jax.batches.ragged import Ragged
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.encoders.named_encoders import configured_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet import familiarity
from hyperlora_jax.hypernet.baselines import BASELINES, Fitted
from hyperlora_jax.hypernet.building import architecture, build_generator, with_remat
from hyperlora_jax.hypernet.generators import Generator
from hyperlora_jax.hypernet.hypernetwork import FOLDER, Hypernetwork
from hyperlora_jax.hypernet.weight_diffusion import Diffusion, Latents
from hyperlora_jax.parallel import multihost, sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.stable_diffusion import prompt_embeddings
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser
from hyperlora_jax.stable_diffusion.embedded import image_size, load_frozen, outline_base
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.subjects.encoded_subjects import EncodedSubjects
from hyperlora_jax.train.hypernetwork.hypernet_data import (
    TrainingTargets,
    read_encoded,
    read_targets,
)
from hyperlora_jax.train.hypernetwork.hypernet_task import Phase, hypernet_task
from hyperlora_jax.train.hypernetwork.objectives import ObjectiveWeights
from hyperlora_jax.train.hypernetwork.vae_training import train_vae
from hyperlora_jax.train.loop import (
    Task,
    arithmetic_dtype,
    fit_section,
    global_batch,
    open_workdir,
)


def train_hypernetwork(config: ConfigDict, workdir: epath.PathLike) -> Hypernetwork:
    """Trains as `configs/avatars.py` describes; writes and returns the hypernetwork.

    Raises:
        UserError: bad config values, a LoRA-target dataset of another base or spec, an unusable
            workdir; see also `train.loop.fit`.
    """
    workdir = open_workdir(workdir)
    scratch = storage.scratch(workdir)
    mesh = make_mesh(**config.mesh)
    section, model = config.train, architecture(config.model)
    needs = Needs.of(config)
    if needs.base:
        sd = load_frozen(config.base, arithmetic_dtype(section), mesh)
    else:
        sd = outline_base(config.base)
    encoder = configured_encoder(config.model)
    check_numbers(section.num_references, section.images_per_subject)
    generator = configured_generator(config, sd)
    spec = generator.spec
    encoded, pictures_facts = read_encoded(
        config, workdir, scratch, sd, encoder, latents=needs.base, texts=needs.texts
    )
    references = encoded.references
    assert references is not None
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
    if generator.needs_targets or needs.targets:
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
        hyper = _fitted(generator, encoder, references, targets, stored, model)
        return _saved(hyper, workdir)
    if isinstance(generator, Diffusion) and isinstance(generator.codec, Latents):
        assert targets is not None
        constants = train_vae(
            generator.codec,
            targets,
            config,
            workdir=section.vae.workdir or workdir / "vae",
            mesh=mesh,
            batch_size=global_batch(section.vae.batch_size, section, mesh),
            facts={**facts, "model": {"vae": model["vae"]}},  # all that a VAE depends on
        )
    prior = None
    if needs.prior:
        picture = (image_size(sd), image_size(sd))
        rows = prompt_embeddings.encode(sd, [section.prior_caption], picture)
        prior = jax.tree.map(lambda array: np.asarray(array[0]), rows)
    frozen = needs.frozen(sd.params["unet"], prior, constants)
    task = training_task(config, mesh, sd, generator, frozen, encoded, targets, facts)
    params = fit_section(task, section, config, workdir, mesh)
    stored_constants = {**(constants if generator.needs_targets else {}), **_known(references)}
    return _saved(
        Hypernetwork(generator, params, encoder, stored, model, stored_constants), workdir
    )


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the losses of a config read.

    Attributes:
        base: the frozen UNet, and latents of the subjects' pictures.
        texts: their captions.
        prior: the prior caption.
        targets: LoRAs.
    """

    base: bool
    texts: bool
    prior: bool
    targets: bool

    @staticmethod
    def of(config: ConfigDict) -> "Needs":
        """Those of a config; a baseline is fitted without any loss."""
        weights = [phase.weights for phase in make_phases(config.train)]
        trained = config.model.generator not in BASELINES
        return Needs(
            base=trained and any(each.need_base for each in weights),
            texts=trained and any(each.end_to_end for each in weights),
            prior=trained and any(each.prior for each in weights),
            targets=any(each.need_targets for each in weights),
        )

    def frozen(self, unet: Params, prior: Params | None, constants: Params) -> Params:
        """The frozen tree of the task, of arrays or of shapes."""
        frozen: dict[str, Params] = {"constants": constants} if constants else {}
        if self.base:
            frozen["unet"] = unet
        return frozen if prior is None else {**frozen, "prior_text": prior}


def configured_generator(config: ConfigDict, sd: StableDiffusion) -> Generator:
    """The generator of a config for a base."""
    spec = sd.lora_spec(config.model.preset, config.model.rank)
    return build_generator(spec, with_remat(architecture(config.model), config.train.remat))


def training_task(
    config: ConfigDict,
    mesh: Mesh | None,
    sd: StableDiffusion,
    generator: Generator,
    frozen: Params,
    encoded: EncodedSubjects,
    targets: TrainingTargets | None,
    facts: Json | None = None,
) -> Task:
    """The task of a config, on a base whose UNet knows the mesh.

    Args:
        mesh: that shares out the batches; None: nobody does.
        frozen: what `Needs.frozen` says, arrays or shapes.
    """
    section, phases = config.train, make_phases(config.train)
    references = encoded.references
    assert references is not None
    return hypernet_task(
        generator,
        frozen,
        _batches(section, mesh, encoded, targets, _targets_until(generator, phases)),
        phases=phases,
        condition_shapes=(
            references.arrays["pooled"].shape[1:],
            references.arrays["tokens"].shape[1:],
        ),
        base=Denoiser(sd.unet.clone(remat=section.remat), sd.schedule, section.min_snr_gamma),
        facts=facts,
        num_images=section.images_per_subject if "unet" in frozen else 0,
    )


def _saved(hyper: Hypernetwork, workdir: epath.Path) -> Hypernetwork:
    if multihost.is_first():
        hyper.save(workdir / FOLDER)
    return hyper


def _targets_until(generator: Generator, phases: Sequence[Phase]) -> int | None:
    """The step from which on no loss looks at target LoRAs, so that everyone can be trained on."""
    if generator.needs_targets or phases[-1].weights.need_targets:
        return None
    return phases[0].until


def _batches(
    section: ConfigDict,
    mesh: Mesh | None,
    encoded: EncodedSubjects,
    targets: TrainingTargets | None,
    targets_until: int | None,
):
    batch_size = global_batch(section.batch_size, section, mesh)
    return subject_batches(
        encoded.references,
        encoded.targets,
        batch_size=batch_size,
        seed=section.seed,
        num_references=section.num_references,
        num_targets=section.images_per_subject,
        per_subject={} if targets is None else {"target": targets.rows},
        subjects=None if targets is None else targets.subjects,
        subjects_until=targets_until,
        order=None if targets is None else targets.order(section.seed),
        rows=None if mesh is None else sharding.host_rows(mesh, batch_size),
    )


def _fitted(
    generator: Fitted,
    encoder: ImageEncoder,
    references: Ragged,
    targets: TrainingTargets | None,
    facts: Json,
    model: Json,
) -> Hypernetwork:
    """A baseline, fitted on the mean embedding of every subject's references."""
    assert targets is not None
    means, rows = references.means("pooled")[targets.subjects], targets.rows.of(targets.subjects)
    constants = {**generator.fit(means, rows), **_known(references)}
    return Hypernetwork(generator, {}, encoder, facts, model, constants)


def _known(references: Ragged) -> Params:
    """Who the training subjects were. Compares them all: at the end, not before the first step."""
    scale = familiarity.fit(references.means("pooled"), references.first("pooled"))
    return {"familiarity": scale}


def make_phases(section: ConfigDict) -> tuple[Phase, ...]:
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


def generate_defaults(section: ConfigDict) -> Json:
    """What `hyperlora generate` uses unless told otherwise, from a config's `generate` section."""
    return dict(section)


def family(sd: StableDiffusion) -> str:
    """ "sd1", "sd2" or "sdxl": whose names a LoRA file for this base carries.

    A base of other sizes counts as the one whose building blocks it shares.
    """
    if sd.unet.settings.addition_time_width is not None:
        return "sdxl"
    return "sd2" if sd.unet.settings.use_linear_projection else "sd1"


def _weights(name: str, section: ConfigDict) -> ObjectiveWeights:
    try:
        return ObjectiveWeights(**dict(section))
    except (TypeError, ValueError) as error:
        raise UserError(f"config.train.{name}: {error}") from error
