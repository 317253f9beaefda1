"""The step that `hyperlora train` or `pretrain --config …` would run, from shapes alone: without
weights, without pictures.

What makes the task of a run makes it here too, of stand-ins for what a run reads, so that both hold
the same arrays. The base may be a full model folder, or one that holds nothing but config.json
files.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hyperlora_jax.aot.ahead_of_time import Workload
from hyperlora_jax.array_types import DType, Params
from hyperlora_jax.batches import ragged
from hyperlora_jax.batches.ragged import Ragged
from hyperlora_jax.encoders.named_encoders import configured_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.generators import Generator
from hyperlora_jax.hypernet.weight_diffusion import Latents
from hyperlora_jax.lora_files.base_files import read_json
from hyperlora_jax.pretrain.unet_finetuning import finetuning_task, training_unet
from hyperlora_jax.stable_diffusion.model import NO_LENGTH, StableDiffusion
from hyperlora_jax.stable_diffusion.prompt_embeddings import row_shapes
from hyperlora_jax.stable_diffusion.weights import loading
from hyperlora_jax.stable_diffusion.weights.single_file import base_folder
from hyperlora_jax.subjects.encoded_subjects import EncodedSubjects
from hyperlora_jax.subjects.encoding_cache import kept_dtype
from hyperlora_jax.train.hypernetwork.hypernet_data import Rows, TrainingTargets
from hyperlora_jax.train.hypernetwork.hypernet_training import (
    Needs,
    configured_generator,
    training_task,
)
from hyperlora_jax.train.loop import Task, arithmetic_dtype

REMAT = ("none", "save_attention", "full")  # from cheap to frugal
Shape = tuple[int, ...]


def config_workload(config: ConfigDict, remat: str | None = None) -> Workload:
    """The workload of a config of `hyperlora train`, or of `pretrain` with task "unet".

    Args:
        remat: in place of the config's `train.remat`.

    Raises:
        UserError: another config, a base without configs, a bad config value.
    """
    tasks = {"hypernetwork": _hypernetwork_tasks, "unet": _unet_tasks}
    task = config.get("task", "hypernetwork" if "model" in config else None)
    if task not in tasks:
        raise UserError(
            f"config.task is {task!r}, expected a config of `hyperlora train` or one of task 'unet'"
        )
    config = copy.deepcopy(config)
    config.train.batch_size, config.train.batch_per_device = 1, False
    if remat:
        config.train.remat = remat
    return _workload(config.train, tasks[task](config))


def _workload(section: ConfigDict, task_on: Callable[[Mesh | None], Task]) -> Workload:
    task = task_on(None)
    example = dict(next(task.batches))
    del example["record_id"]  # stays on the host

    def batch(size: int) -> Params:
        return jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct((size, *rows.shape[1:]), rows.dtype), example
        )

    return Workload(
        name=task.name,
        init=task.init,
        loss=task.loss,
        loss_on=lambda mesh: task_on(mesh).loss,
        frozen=task.frozen,
        batch=batch,
        optimizer=dict(section.optimizer),
        ema_decay=section.ema_decay,
        remat=section.remat,
    )


def _unet_tasks(config: ConfigDict) -> Callable[[Mesh | None], Task]:
    """mesh → the task of full UNet training (`configs/finetune_unet.py`)."""
    section, sd = config.train, _outline(config, jnp.float32)
    text = row_shapes(sd.unet.settings, _num_tokens(sd))
    unet = training_unet(sd.unet, section, None)
    arrays = {"latents": _rows(1, _latent(sd)), "text": _tree_of_rows(1, text, np.float32)}
    frozen = {"empty_text": _shapes(text, np.float32)}

    def on_mesh(mesh: Mesh | None) -> Task:
        return finetuning_task(unet.clone(mesh=mesh), sd.schedule, frozen, arrays, section, None)

    return on_mesh


def _hypernetwork_tasks(config: ConfigDict) -> Callable[[Mesh | None], Task]:
    """mesh → the task of `hyperlora train`; subjects have as many pictures as it can use."""
    section, needs, dtype = config.train, Needs.of(config), arithmetic_dtype(config.train)
    sd = _outline(config, dtype)
    generator = configured_generator(config, sd)
    text = row_shapes(sd.unet.settings, _num_tokens(sd))
    # Where the config leaves it open, the shipped one stands in, for its shapes.
    encoder = configured_encoder(config.model, config.model.encoder or "avatar")
    width, count = encoder.embedding_dim, section.num_references[1]
    told = {
        "pooled": _rows(count, (width,), dtype),
        "tokens": _rows(count, (encoder.num_tokens, width), dtype),
    }
    shown: dict[str, object] = {}
    if needs.base:
        shown["latents"] = _rows(1, _latent(sd), dtype)
    if needs.texts:
        shown["text"] = _tree_of_rows(1, text, dtype)
    encoded = EncodedSubjects(
        ("",),
        Ragged(ragged.offsets_of([count]), told),
        Ragged(ragged.offsets_of([1]), shown) if shown else None,
    )
    targets, constants = None, {}
    if generator.needs_targets or needs.targets:
        constants = _constants(generator)
        targets = _one_target(generator.spec.num_parameters)
    # Its condition embeddings are not kept, but taken as the base gives them.
    prior = _shapes(text, dtype) if needs.prior else None
    frozen = needs.frozen(sd.params["unet"], prior, constants)

    def on_mesh(mesh: Mesh | None) -> Task:
        there = dataclasses.replace(sd, unet=sd.unet.clone(mesh=mesh))
        return training_task(config, None, there, generator, frozen, encoded, targets)

    return on_mesh


def _outline(config: ConfigDict, dtype: DType) -> StableDiffusion:
    """The base in shapes, with what "auto" attention is on a TPU; this machine has none to tell."""
    sd = StableDiffusion.outline(base_folder(config.base))
    unet = sd.unet.clone(dtype=dtype, attention="splash")
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), sd.params["unet"])
    schedule = sd.schedule if sd.path is None else loading.load_schedule(sd.path)
    return dataclasses.replace(sd, unet=unet, params={"unet": weights}, schedule=schedule)


def _latent(sd: StableDiffusion) -> Shape:
    side = sd.unet.settings.sample_size[0]  # pictures are squares
    return side, side, sd.unet.settings.out_channels


def _num_tokens(sd: StableDiffusion) -> int:
    """The window of `StableDiffusion.tokenize`, as far as the configs that are there tell it."""
    window = NO_LENGTH
    if sd.path is not None:
        file = sd.path / "tokenizer" / "tokenizer_config.json"
        if file.exists():
            window = int(read_json(file).get("model_max_length", NO_LENGTH))
    if sd.text_encoder is not None:
        window = min(window, sd.text_encoder.values["max_position_embeddings"])
    return window if window < NO_LENGTH else 77


def _rows(count: int, shape: Shape, dtype: DType = np.float32) -> np.ndarray:
    """Zeros [count, *shape] that take no memory."""
    return np.broadcast_to(np.zeros((), dtype), (count, *shape))


def _tree_of_rows(count: int, shapes: Mapping[str, Shape], dtype: DType) -> dict[str, np.ndarray]:
    return {name: _rows(count, shape, kept_dtype(name, dtype)) for name, shape in shapes.items()}


def _shapes(shapes: Mapping[str, Shape], dtype: DType) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(shape, kept_dtype(name, dtype)) for name, shape in shapes.items()
    }


def _one_target(size: int) -> TrainingTargets:
    first = np.zeros(1, np.int64)
    nothing = np.zeros(0, np.float32)
    return TrainingTargets(Rows((_rows(1, (size,)),), first, first), first, nothing, nothing, {})


def _constants(generator: Generator) -> dict[str, object]:
    """Shapes of what a generator reads of its LoRA-target dataset."""
    spec = generator.spec
    sizes = {"mean": spec.num_parameters, "std": 2 * len(spec)}
    codec = getattr(generator, "codec", None)
    shapes: dict[str, object] = {}
    if isinstance(codec, Latents):
        sizes |= {"latent_mean": codec.size, "latent_std": codec.size}
        x = jax.ShapeDtypeStruct((1, spec.num_parameters), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        shapes["vae"] = jax.eval_shape(codec.vae.init, key, x, key)["params"]
    return shapes | {k: jax.ShapeDtypeStruct((n,), jnp.float32) for k, n in sizes.items()}
