"""`hyperlora pretrain`: a base model of one's own, from pictures to a diffusers folder.

    pictures ─► tokenizer ─► autoencoder ─► latents ─► UNet (and text encoder) ─► export

Each stage keeps its result in the workdir, so that a killed run goes on where it was.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json, Params
from hyperlora_jax.batches.pipelines import array_batches
from hyperlora_jax.diffusion.scheduler_config import read_scheduler_config
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import multihost, sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.pretrain import base_task
from hyperlora_jax.pretrain.level_widths import level_widths
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.networks.autoencoder import AutoencoderKL, vae_from_config
from hyperlora_jax.stable_diffusion.networks.clip_text import ClipTextOutput, text_model_from_config
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.tokenizer_training import train_tokenizer
from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params
from hyperlora_jax.subjects.encoded_subjects import encode_in_batches
from hyperlora_jax.train.checkpoints import restore_params
from hyperlora_jax.train.loop import Task, export_folder, fit_section, open_workdir
from hyperlora_jax.worlds.by_style import open_world

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

KEPT = ("tokenizer", "latents.npy")  # what an export needs beside the checkpoints

# Zero terminal SNR, velocity prediction, trailing steps (Lin et al., arXiv 2305.08891): without
# them the last step is not pure noise in training, and sampled colours drift.
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}


def pretrain(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Trains a base model as `configs/tiny_sd.py` describes it; returns the exported folder.

    Raises:
        UserError: bad config values, unusable workdir; see also `train.loop.fit`.
    """
    out = export_folder(config, workdir, "base")
    workdir = open_workdir(workdir)
    scratch = storage.scratch(workdir)
    storage.pull(workdir, *KEPT)
    mesh = make_mesh(**config.mesh)
    images, captions = multihost.first_then_others(
        "pictures", lambda: _draw_avatars(config, scratch)
    )
    tokenizer = multihost.first_then_others(
        "tokenizer", lambda: _tokenizer(config, scratch, captions)
    )
    vae, vae_params = _train_autoencoder(config, workdir, mesh, images)
    latents = multihost.first_then_others(
        "latents", lambda: _latents(vae, vae_params, scratch / "latents.npy", images)
    )
    if multihost.is_first():
        storage.push(workdir, *KEPT)
    vae, latents = _normalised(vae, latents)
    trained, modules = _train_unet(config, workdir, mesh, tokenizer, captions, latents)
    sd = StableDiffusion(
        params={**trained, "vae": vae_params},
        schedule=read_scheduler_config(SCHEDULER_CONFIG),
        default_guidance=1.0,  # a small world is drawn well without
        vae=vae,
        **modules,
    )
    if multihost.is_first():
        with storage.writing(out, scratch) as folder:
            sd.save_pretrained(folder, dtype="float16")
    return out


def assemble(config: ConfigDict, workdir: epath.Path, params: Params) -> StableDiffusion:
    """The base model of a workdir whose UNet and text encoder have these parameters.

    Raises:
        UserError: the workdir lacks its tokenizer, latents or autoencoder checkpoint.
    """
    from transformers import CLIPTokenizer

    storage.pull(workdir, *KEPT)
    scratch = storage.scratch(workdir)
    for name in KEPT:
        if not (scratch / name).exists():
            raise UserError(f"{workdir}: has no {name}, expected a workdir of `hyperlora pretrain`")
    vae_params, meta = restore_params(workdir / "autoencoder")
    vae = vae_from_config(meta["facts"]["autoencoder"])
    latents = np.load(scratch / "latents.npy", mmap_mode="r", allow_pickle=False)
    tokenizer = CLIPTokenizer.from_pretrained(scratch / "tokenizer")
    return StableDiffusion(
        unet=unet_from_config(unet_config(config.base.unet, latents.shape)),
        params={**params, "vae": vae_params},
        schedule=read_scheduler_config(SCHEDULER_CONFIG),
        default_guidance=1.0,  # a small world is drawn well without
        vae=_normalised(vae, latents)[0],
        text_encoder=text_model_from_config(text_config(config.base.text_encoder, tokenizer)),
        tokenizers=(tokenizer,),
    )


def _draw_avatars(config: ConfigDict, scratch: Path) -> tuple[np.ndarray, list[str]]:
    """Pictures uint8 [n, h, w, 3] of training identities in training views, and their captions."""
    avatars = open_world(config.data.style, config.data.size, config.data.split_seed)
    people = avatars.training_people(config.data.num_identities, config.data.num_views)
    pairs = [(person, view) for person, own in people for view in own]
    images = avatars.render_many(pairs, cache_dir=scratch / "renders")
    return images, [avatars.caption(view) for _, view in pairs]


def _tokenizer(config: ConfigDict, scratch: Path, captions: list[str]) -> "CLIPTokenizer":
    """The tokenizer of the captions, kept in the workdir."""
    from transformers import CLIPTokenizer

    folder = scratch / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        train_tokenizer(captions, folder, model_max_length=config.base.model_max_length)
    return CLIPTokenizer.from_pretrained(folder)


def _train_autoencoder(
    config: ConfigDict, workdir: epath.Path, mesh: Mesh, images: np.ndarray
) -> tuple[AutoencoderKL, Params]:
    section = config.autoencoder
    channels = level_widths(
        config.base.autoencoder.block_out_channels,
        images.shape[1],
        config.base.latent_size,
        config.base.autoencoder.norm_num_groups,
    )
    shape = {**config.base.autoencoder, "block_out_channels": channels}
    vae = vae_from_config(autoencoder_config(shape, images.shape[1]))
    loss = functools.partial(
        base_task.autoencoder_loss,
        vae=vae,
        kl_weight=section.kl_weight,
        l1_weight=section.l1_weight,
    )
    task = Task(
        name="autoencoder",
        init=functools.partial(init_params, vae),
        loss=loss,
        frozen={},
        batches=array_batches(
            {"images": images},
            section.batch_size,
            config.train.seed,
            sharding.host_rows(mesh, section.batch_size),
        ),
        facts={"autoencoder": dict(vae.config)},
        units={"images": 1},
    )
    return vae, fit_section(task, section, config, workdir / "autoencoder", mesh)


def _latents(vae: AutoencoderKL, params: Params, file: Path, images: np.ndarray) -> np.ndarray:
    """Unscaled latents [n, h, w, c] float16 of all pictures, kept in `file`."""
    if file.exists():
        return np.load(file, mmap_mode="r", allow_pickle=False)

    @jax.jit
    def encode(weights, chunk):  # an argument: closed over, it would be constants of the program
        pixels = jnp.asarray(chunk, jnp.float32) / 127.5 - 1.0
        return vae.apply({"params": weights}, pixels, method="encode")[0].astype(jnp.float16)

    placed = functools.partial(encode, jax.device_put(params))
    latents = encode_in_batches(placed, images, 256, "latents")
    temporary = file.with_suffix(".tmp.npy")
    np.save(temporary, latents)
    temporary.replace(file)
    return latents


def _normalised(vae: AutoencoderKL, latents: np.ndarray) -> tuple[AutoencoderKL, np.ndarray]:
    """The autoencoder with the scaling factor that gives its latents unit variance."""
    factor = float(1.0 / np.std(latents[:8192].astype(np.float32)))
    config = {**vae.config, "scaling_factor": round(factor, 5)}
    scaled = (latents.astype(np.float32) * config["scaling_factor"]).astype(np.float16)
    return vae_from_config(config), scaled


def _train_unet(
    config: ConfigDict,
    workdir: epath.Path,
    mesh: Mesh,
    tokenizer: "CLIPTokenizer",
    captions: list[str],
    latents: np.ndarray,
) -> tuple[Params, Json]:
    encoded = tokenizer([*captions, ""], padding="max_length", truncation=True)["input_ids"]
    ids = np.asarray(encoded, np.int32)
    text = text_model_from_config(text_config(config.base.text_encoder, tokenizer))
    unet = unet_from_config(unet_config(config.base.unet, latents.shape))

    def init(key):
        text_key, unet_key = jax.random.split(key)
        return {"unet": init_params(unet, unet_key), "text_encoder": init_params(text, text_key)}

    def encode_text(params, frozen, token_ids):
        del frozen
        given = {"params": params["text_encoder"]}
        output = cast(ClipTextOutput, text.apply(given, token_ids))
        return {"states": output.last_hidden_state}

    section = config.train
    task = base_task.unet_task(
        Denoiser(unet, read_scheduler_config(SCHEDULER_CONFIG), section.min_snr_gamma),
        encode_text,
        init,
        {"empty_text": ids[-1]},
        array_batches(
            {"latents": latents, "text": ids[:-1]},
            section.batch_size,
            section.seed,
            sharding.host_rows(mesh, section.batch_size),
        ),
        caption_dropout=section.caption_dropout,
        facts={"unet": dict(unet.config), "text_encoder": dict(text.config)},
    )
    modules = {"unet": unet, "text_encoder": text, "tokenizers": (tokenizer,)}
    return fit_section(task, section, config, workdir, mesh), modules


def autoencoder_config(section: ConfigDict | Json, image_size: int) -> Json:
    """diffusers config.json of an AutoencoderKL."""
    levels = len(section["block_out_channels"])
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "act_fn": "silu",
        "sample_size": image_size,
        "scaling_factor": 1.0,
        **_plain(section),
    }


def unet_config(section: ConfigDict, latents_shape: tuple[int, ...]) -> Json:
    """diffusers config.json of a UNet2DConditionModel with cross-attention on every level."""
    levels = len(section["block_out_channels"])
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": latents_shape[1],
        "in_channels": latents_shape[-1],
        "out_channels": latents_shape[-1],
        "down_block_types": ["CrossAttnDownBlock2D"] * levels,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D"] * levels,
        **_plain(section),
    }


def text_config(section: ConfigDict, tokenizer: "CLIPTokenizer") -> Json:
    """transformers config.json of a CLIPTextModel for a tokenizer."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": section["hidden_size"],
        **_plain(section),
    }


def _plain(section: ConfigDict | Json) -> Json:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dict(section).items()}
