"""The step that `hyperlora train` or `pretrain --config …` would run, from shapes alone: without
weights, without pictures.

The base may be a full model folder, or one that holds nothing but config.json files.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hyperlora_jax.diffusion.scheduler_config import read_scheduler_config
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.building import architecture, build_generator, with_remat
from hyperlora_jax.hypernet.conditioning import configured_encoder
from hyperlora_jax.hypernet.weight_vae import Latents
from hyperlora_jax.lora.sites import spec_from_shapes
from hyperlora_jax.shipped import base_path
from hyperlora_jax.stable_diffusion import directory
from hyperlora_jax.stable_diffusion.checkpoint import param_shapes
from hyperlora_jax.stable_diffusion.packed_text import extra_rows
from hyperlora_jax.stable_diffusion.unet import unet_from_config
from hyperlora_jax.stable_diffusion.unet_config import UNetConfig
from hyperlora_jax.train.ahead_of_time import Workload
from hyperlora_jax.train.configured import arithmetic_dtype
from hyperlora_jax.train.hypernet_task import Base, hypernet_task
from hyperlora_jax.train.hypernet_training import make_phases
from hyperlora_jax.train.loop import Task
from hyperlora_jax.train.unet_finetuning import finetuning_task, training_unet

REMAT = ("none", "save_attention", "full")  # from cheap to frugal


def config_workload(config: Any, remat: str | None = None) -> Workload:
    """The workload of a config of `hyperlora train`, or of `pretrain` with task "unet".

    Raises:
      UserError: another config; see also the two functions below.
    """
    task = config.get("task", "hypernetwork" if "model" in config else None)
    if task == "hypernetwork":
        return hypernetwork_workload(config, remat)
    if task == "unet":
        return unet_workload(config, remat)
    raise UserError(
        f"config.task is {task!r}, expected a config of `hyperlora train` or one of task 'unet'"
    )


def unet_workload(config: Any, remat: str | None = None) -> Workload:
    """The workload of full UNet training (`configs/finetune_unet.py`).

    Raises:
      UserError: the base's configs are missing, or a config value is bad.
    """
    root = Path(base_path(config.base))
    unet_config = directory.read_json(root / "unet" / "config.json")
    schedule = directory.read_json(root / "scheduler" / "scheduler_config.json")
    section = config.train
    remat = remat or section.remat
    plain = unet_from_config(unet_config).clone(attention="splash")
    unet = training_unet(plain, section, None).clone(remat=remat)
    text = (_num_text_rows(root, unet.settings), unet.settings.context_width)
    frozen = {"empty_text": jax.ShapeDtypeStruct(text, jnp.float32)}

    def on_mesh(mesh: Mesh | None) -> Task:
        noise = read_scheduler_config(schedule)
        return finetuning_task(unet.clone(mesh=mesh), noise, frozen, None, section, None)

    side = _latent_side(config, unet_config, root)
    arrays = {
        "latents": ((side, side, int(unet_config["in_channels"])), jnp.float32),
        "text": (text, jnp.float32),
        "record_id": ((), jnp.int32),
    }
    task = on_mesh(None)
    return Workload(
        name="unet",
        init=task.init,
        loss=task.loss,
        loss_on=lambda mesh: on_mesh(mesh).loss,
        frozen=frozen,
        batch=lambda size: {
            name: jax.ShapeDtypeStruct((size, *shape), dtype)
            for name, (shape, dtype) in arrays.items()
        },
        optimizer=dict(section.optimizer),
        ema_decay=section.ema_decay,
        rules=task.rules,
        frozen_rules=task.frozen_rules,
        remat=remat,
    )


def _latent_side(config: Any, unet_config: Any, root: Path) -> int:
    if not config.data.size:  # the base's own
        return int(np.max(unet_config["sample_size"]))
    vae_config = directory.read_json(root / "vae" / "config.json")
    return config.data.size // 2 ** (len(vae_config["block_out_channels"]) - 1)


def hypernetwork_workload(config: Any, remat: str | None = None) -> Workload:
    """The workload of a `hyperlora train` config, with another `train.remat` where one is given.

    Raises:
      UserError: the base's configs are missing, or a config value is bad.
    """
    root = Path(base_path(config.base))
    unet_config = directory.read_json(root / "unet" / "config.json")
    schedule = directory.read_json(root / "scheduler" / "scheduler_config.json")
    # What "auto" is on a TPU; this machine has none to tell.
    dtype, remat = arithmetic_dtype(config.train), remat or config.train.remat
    unet = unet_from_config(unet_config, dtype).clone(remat=remat, attention="splash")
    weights = param_shapes(unet)
    spec = spec_from_shapes(weights, config.model.preset, config.model.rank)
    generator = build_generator(spec, with_remat(architecture(config.model), remat))
    # Where the config leaves it open, the shipped one stands in, for its shapes.
    encoder = configured_encoder(config.model, config.model.encoder or "avatar")
    pooled, tokens = _condition_shapes(encoder)
    section = config.train
    phases = make_phases(section)
    needs_base = any(phase.weights.need_base for phase in phases)
    needs_texts = any(phase.weights.end_to_end for phase in phases)
    needs_targets = generator.needs_targets or any(p.weights.need_targets for p in phases)
    text = (_num_text_rows(root, unet.settings), unet.settings.context_width)
    # Packed with pictures' sizes they are kept exact (`data/encoding_cache.py`).
    text_dtype = jnp.float32 if extra_rows(unet.settings) else dtype
    frozen: dict[str, Any] = {}
    if needs_base:
        frozen["unet"] = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), weights)
    if any(phase.weights.prior for phase in phases):
        frozen["prior_text"] = jax.ShapeDtypeStruct(text, jnp.float32)
    if needs_targets:
        frozen["constants"] = _constant_shapes(generator)

    def on_mesh(mesh: Mesh | None) -> Task:
        base = Base(unet.clone(mesh=mesh), read_scheduler_config(schedule), section.min_snr_gamma)
        return hypernet_task(
            generator,
            frozen,
            None,
            phases=phases,
            condition_shapes=(pooled, tokens),
            base=base,
        )

    task = on_mesh(None)
    side = _latent_side(config, unet_config, root)
    latent = (section.images_per_subject, side, side, int(unet_config["in_channels"]))
    refs = section.num_references[1]

    def batch(size: int) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {
            "pooled": ((size, refs, *pooled), dtype),
            "tokens": ((size, refs, *tokens), dtype),
            "reference_mask": ((size, refs), jnp.bool_),
            "step": ((size,), jnp.int32),
            "record_id": ((size,), jnp.int32),
        }
        if needs_base:
            shapes["latents"] = ((size, *latent), dtype)
        if needs_texts:
            shapes["text_states"] = ((size, latent[0], *text), text_dtype)
        if needs_targets:
            shapes["target"] = ((size, spec.num_parameters), jnp.float32)
        return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}

    return Workload(
        name="train",
        init=task.init,
        loss=task.loss,
        loss_on=lambda mesh: on_mesh(mesh).loss,
        frozen=task.frozen,
        batch=batch,
        optimizer=dict(section.optimizer),
        ema_decay=section.ema_decay,
        rules=task.rules,
        frozen_rules=task.frozen_rules,
        remat=remat,
    )


def _constant_shapes(generator: Any) -> dict[str, Any]:
    """Shapes of what a generator reads of its LoRA-target dataset."""
    spec = generator.spec
    sizes = {"mean": spec.num_parameters, "std": 2 * len(spec)}
    codec = getattr(generator, "codec", None)
    found: dict[str, Any] = {}
    if isinstance(codec, Latents):
        sizes |= {"latent_mean": codec.size, "latent_std": codec.size}
        x = jax.ShapeDtypeStruct((1, spec.num_parameters), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        found["vae"] = jax.eval_shape(codec.vae.init, key, x, key)["params"]
    return found | {k: jax.ShapeDtypeStruct((n,), jnp.float32) for k, n in sizes.items()}


def _condition_shapes(encoder: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    width = encoder.embedding_dim
    return (width,), (encoder.num_tokens, width)


def _num_text_rows(root: Path, settings: UNetConfig) -> int:
    file = root / "tokenizer" / "tokenizer_config.json"
    tokens = int(directory.read_json(file)["model_max_length"]) if file.exists() else 77
    return tokens + extra_rows(settings)
