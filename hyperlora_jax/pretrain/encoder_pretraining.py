"""`hyperlora pretrain` for the avatar world's identity encoder and attribute probe."""

from collections.abc import Callable

from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json, Params
from hyperlora_jax.parallel import multihost, sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.pretrain import encoder_task, probe_task
from hyperlora_jax.pretrain.level_widths import level_widths
from hyperlora_jax.pretrain.render_bundle import RenderBundle, render_bundle
from hyperlora_jax.train.loop import export_folder, fit_section, open_workdir
from hyperlora_jax.worlds.by_style import open_world

SMALLEST = 4  # cells per side of the encoder's last level


def pretrain_encoder(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Trains the identity encoder on training identities; returns the exported folder."""
    out = export_folder(config, workdir, "encoder")
    bundle, mesh = _bundle(config, workdir), make_mesh(**config.mesh)
    task = encoder_task.make_task(
        bundle,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        weights=dict(config.train.weights),
        rows=sharding.host_rows(mesh, config.train.batch_size),
        **{**config.model.to_dict(), "encoder": _encoder(config, bundle)},
    )
    params = fit_section(task, config.train, config, workdir, mesh)
    return _export(encoder_task.export_encoder, params, bundle, config, workdir, out)


def pretrain_probe(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Trains the attribute probe on renders; returns the exported folder."""
    out = export_folder(config, workdir, "probe")
    bundle, mesh = _bundle(config, workdir), make_mesh(**config.mesh)
    task = probe_task.make_task(
        bundle,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        encoder=_encoder(config, bundle),
        augmentation=dict(config.train.augmentation),
        rows=sharding.host_rows(mesh, config.train.batch_size),
    )
    params = fit_section(task, config.train, config, workdir, mesh)
    return _export(probe_task.export_probe, params, bundle, config, workdir, out)


def _encoder(config: ConfigDict, bundle: RenderBundle) -> Json:
    """The encoder's section, its levels fitted to the size of the pictures."""
    section = config.model.encoder.to_dict()
    widths = level_widths(section["widths"], bundle.images.shape[2], SMALLEST)
    return {**section, "widths": tuple(widths)}


def _bundle(config: ConfigDict, workdir: epath.PathLike) -> RenderBundle:
    scratch = storage.scratch(open_workdir(workdir))
    if config.data.bundle:
        return RenderBundle.load(config.data.bundle)
    avatars = open_world(config.data.style, config.data.size, config.data.split_seed)
    people, views = config.data.num_identities, config.data.num_views
    return multihost.first_then_others(
        "pictures", lambda: render_bundle(avatars, people, views, cache_dir=scratch / "renders")
    )


def _export(
    export: Callable[..., object],
    params: Params,
    bundle: RenderBundle,
    config: ConfigDict,
    workdir: epath.PathLike,
    out: epath.Path,
) -> epath.Path:
    """The folder `out`, which one process writes for all."""
    if multihost.is_first():
        facts = {"num_steps": config.train.num_steps}
        encoder = _encoder(config, bundle)
        with storage.writing(out, storage.scratch(workdir)) as folder:
            export(folder, params, bundle, encoder=encoder, name=config.export.name, facts=facts)
    return out
