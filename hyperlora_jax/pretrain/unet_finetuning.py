"""`hyperlora pretrain` with a config of task "unet": the whole UNet of a base model, on pictures.

    base model ─► latents and text states of all pictures, once ─► UNet ─► diffusers folder

The autoencoder and the text encoders stay as they are. The result is a base model like any other:
LoRAs can be distilled on it, a hypernetwork trained through it.
"""

from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json, Params
from hyperlora_jax.batches.pipelines import array_batches
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.parallel import multihost, sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.pretrain import base_task
from hyperlora_jax.stable_diffusion import prompt_embeddings
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser
from hyperlora_jax.stable_diffusion.embedded import ENCODERS, image_size, load_base
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.networks.unet import UNet
from hyperlora_jax.stable_diffusion.prompt_embeddings import Text
from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params
from hyperlora_jax.subjects.encoding_cache import encode_once
from hyperlora_jax.subjects.subject_pictures import load_pictures
from hyperlora_jax.train.loop import (
    Task,
    arithmetic_dtype,
    export_folder,
    fit_section,
    global_batch,
    open_workdir,
)


def finetune_unet(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Trains as `configs/finetune_unet.py` describes; returns the exported folder.

    Raises:
        UserError: bad config values, a base that cannot be trained, an unusable workdir; see also
            `train.loop.fit`.
    """
    out = export_folder(config, workdir, "base")
    workdir = open_workdir(workdir)
    scratch = storage.scratch(workdir)
    mesh = make_mesh(**config.mesh)
    sd = load_base(config.base, on_host=("unet", *ENCODERS))
    unet = training_unet(sd.unet, config.train, mesh)
    arrays, empty_text, facts = _encoded(config, workdir, scratch, sd)
    section = config.train
    task = finetuning_task(
        unet,
        sd.schedule,
        {"empty_text": empty_text},
        arrays,
        section,
        mesh,
        start=None if section.from_scratch else {"unet": sd.params["unet"]},
        facts={**facts, "base": config.base, "base_hash": sd.base_hash},
    )
    params = fit_section(task, section, config, workdir, mesh)
    if multihost.is_first():
        with storage.writing(out, scratch) as folder:
            sd.replace_params(params).save_pretrained(folder, dtype=config.export.dtype)
    return out


def training_unet(unet: UNet, section: ConfigDict, mesh: Mesh | None) -> UNet:
    """A base's UNet with the arithmetic that a config's `train` section asks for.

    Raises:
        UserError: an unknown dtype.
    """
    return unet.clone(dtype=arithmetic_dtype(section), remat=section.remat, mesh=mesh)


def finetuning_task(
    unet: UNet,
    schedule: NoiseSchedule,
    frozen: Params,
    arrays: Params,
    section: ConfigDict,
    mesh: Mesh | None,
    start: Params | None = None,
    facts: dict[str, object] | None = None,
) -> Task:
    """The task of the training loop.

    Args:
        frozen: {"empty_text": embeddings of the empty caption, one row}.
        arrays: {"latents": [m, h, w, c], "text": embeddings of the captions, m rows}.
        start: {"unet": parameters} to go on from; None draws new ones.
    """
    batch_size = global_batch(section.batch_size, section, mesh)
    rows = None if mesh is None else sharding.host_rows(mesh, batch_size)
    return base_task.unet_task(
        Denoiser(unet, schedule, section.min_snr_gamma),
        _as_it_is,
        lambda key: {"unet": init_params(unet, key)},
        frozen,
        array_batches(arrays, batch_size, section.seed, rows),
        caption_dropout=section.caption_dropout,
        facts=facts,
        start=start,
    )


def _as_it_is(params: Params, frozen: Params, text: Text) -> Text:
    del params, frozen
    return text


def _encoded(
    config: ConfigDict, workdir: epath.Path, scratch: Path, sd: StableDiffusion
) -> tuple[Params, Params, Json]:
    """({"latents", "text"} of every picture, embeddings of the empty prompt, facts)."""
    size, count = image_size(sd), config.data.num_identities
    pictures = multihost.first_then_others(
        "pictures", lambda: load_pictures(config.data, count, size, scratch / "renders")
    )
    encoded = encode_once(workdir, sd, pictures, batch_size=config.train.encode_batch_size)
    assert encoded.targets is not None
    empty = prompt_embeddings.encode_nothing(sd, (size, size))
    empty = jax.tree.map(lambda rows: np.asarray(rows, np.float32)[0], empty)
    return dict(encoded.targets.arrays), empty, {"data": dict(pictures.facts)}
