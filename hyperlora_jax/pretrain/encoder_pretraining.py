"""`hyperlora pretrain` for the avatar world's identity encoder and attribute probe."""

from collections.abc import Callable

from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json
from hyperlora_jax.parallel import multihost, sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.pretrain import encoder_task, probe_task
from hyperlora_jax.pretrain.level_widths import level_widths
from hyperlora_jax.pretrain.render_bundle import RenderBundle, render_bundle
from hyperlora_jax.train.loop import Task, export_folder, fit_section, open_workdir
from hyperlora_jax.worlds.by_style import open_world

SMALLEST = 4  # cells per side of the encoder's last level


def pretrain_encoder(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Trains the identity encoder on training identities; returns the exported folder."""
    options = {**config.model.to_dict(), "weights": dict(config.train.weights)}
    make, export = encoder_task.make_task, encoder_task.export_encoder
    return _pretrain(config, workdir, "encoder", make, export, options)


def pretrain_probe(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Trains the attribute probe on renders; returns the exported folder."""
    options = {"augmentation": dict(config.train.augmentation)}
    return _pretrain(
        config, workdir, "probe", probe_task.make_task, probe_task.export_probe, options
    )


def _pretrain(
    config: ConfigDict,
    workdir: epath.PathLike,
    name: str,
    make_task: Callable[..., Task],
    export: Callable[..., object],
    options: Json,
) -> epath.Path:
    """The folder `name` of the workdir, or that of the config, which one process writes for all."""
    out = export_folder(config, workdir, name)
    bundle, mesh, section = _bundle(config, workdir), make_mesh(**config.mesh), config.train
    encoder = config.model.encoder.to_dict()
    # Its levels fitted to the size of the pictures.
    encoder["widths"] = tuple(level_widths(encoder["widths"], bundle.images.shape[2], SMALLEST))
    rows = sharding.host_rows(mesh, section.batch_size)
    given = {**options, "encoder": encoder, "rows": rows}
    task = make_task(bundle, batch_size=section.batch_size, seed=section.seed, **given)
    params = fit_section(task, section, config, workdir, mesh)
    if multihost.is_first():
        facts = {"num_steps": section.num_steps}
        with storage.writing(out, storage.scratch(workdir)) as folder:
            export(folder, params, bundle, encoder=encoder, name=config.export.name, facts=facts)
    return out


def _bundle(config: ConfigDict, workdir: epath.PathLike) -> RenderBundle:
    scratch = storage.scratch(open_workdir(workdir))
    if config.data.bundle:
        return RenderBundle.load(config.data.bundle)
    avatars = open_world(config.data.style, config.data.size, config.data.split_seed)
    people, views = config.data.num_identities, config.data.num_views
    return multihost.first_then_others(
        "pictures", lambda: render_bundle(avatars, people, views, cache_dir=scratch / "renders")
    )
