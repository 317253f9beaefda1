"""`hyperlora export`: the newest checkpoint of a workdir as files that others read.

A `pretrain` workdir becomes a diffusers directory, a `train` workdir a hypernetwork folder.
"""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    from hyperlora_jax.hypernet.hypernetwork import Hypernetwork


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Workdir and output folder."""
    from hyperlora_jax.cli import arguments

    parser.add_argument("workdir", help="workdir of `hyperlora pretrain` or `hyperlora train`")
    arguments.add_output(parser, "DIR", "folder to write")
    parser.add_argument(
        "--step", type=_step, help="checkpoint: its step, or `best`; default: the newest"
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument(
        "--encoder", metavar="PATH", help="of a hypernetwork: condition encoder, where it was moved"
    )


def _step(text: str) -> int | str:
    return text if text == "best" else int(text)


def run(args: argparse.Namespace) -> int:
    """Writes the folder."""
    import ml_collections

    from hyperlora_jax.train.checkpoints import restore_params

    workdir = epath.Path(args.workdir)
    params, meta = restore_params(workdir, args.step)
    config = ml_collections.ConfigDict(meta["config"])
    out = epath.Path(args.out)
    if config.get("task") == "unet":
        from hyperlora_jax.stable_diffusion.embedded import load_base

        with storage.writing(out, storage.scratch(workdir)) as folder:
            load_base(config.base).replace_params(params).save_pretrained(folder, dtype=args.dtype)
    elif "unet" in params:
        from hyperlora_jax.pretrain.pretraining import assemble

        with storage.writing(out, storage.scratch(workdir)) as folder:
            assemble(config, workdir, params).save_pretrained(folder, dtype=args.dtype)
    elif "spec" in meta["facts"] and "encoder" in meta["facts"]:
        _hypernetwork(workdir, config, params, meta, args.encoder).save(out)
    else:
        raise UserError(
            f"{args.workdir}: its checkpoint holds {', '.join(sorted(params))}; expected the "
            "workdir of `hyperlora pretrain` (a base model) or `hyperlora train`"
        )
    print(f"wrote {out} (step {meta['step']})")
    return 0


def _hypernetwork(
    workdir: epath.Path, config: Any, params: Params, meta: Mapping[str, Any], path: str | None
) -> "Hypernetwork":
    """The hypernetwork of a training checkpoint. What is known only at the end of the training
    (statistics of a LoRA dataset, defaults of `generate`) is that of the finished one beside it."""
    from hyperlora_jax.encoders import stored_encoder
    from hyperlora_jax.encoders.named_encoders import configured_encoder
    from hyperlora_jax.hypernet.building import architecture, build_generator
    from hyperlora_jax.hypernet.hypernetwork import FOLDER, Hypernetwork, read_stored
    from hyperlora_jax.shipped import base_path
    from hyperlora_jax.stable_diffusion.model import StableDiffusion

    model = architecture(config.model)
    facts, constants = {**meta["facts"], "num_steps": meta["step"]}, {}
    if (workdir / FOLDER / "model.safetensors").exists():
        finished = read_stored(workdir)
        generator = build_generator(finished.spec, model)
        encoder = stored_encoder.find(finished.folder, finished.config["encoder"], path)
        facts, constants = {**finished.config["facts"], **facts}, dict(finished.constants)
    else:
        outline = StableDiffusion.outline(base_path(config.base))
        spec = outline.lora_spec(config.model.preset, config.model.rank)
        generator = build_generator(spec, model)
        if generator.needs_targets:
            raise UserError(
                f"{workdir}: its training has not ended, and what {config.model.generator} needs "
                "of its LoRA dataset is written then; let `hyperlora train` finish"
            )
        encoder = configured_encoder(config.model, path)
        record = {**stored_encoder.describe(encoder), "hash": meta["facts"]["encoder"]}
        stored_encoder.checked(f"checkpoint of {workdir}", record, encoder, encoder.source)
    return Hypernetwork(generator, params, encoder, facts, model, constants)
