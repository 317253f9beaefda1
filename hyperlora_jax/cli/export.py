"""`hyperlora export`: what was trained, as files that others read.

pretrain workdir                        diffusers   a folder of diffusers (the default)
train workdir or hypernetwork folder    jax         a hypernetwork folder (the default)
                                        pytorch     weights and the one file that runs them
                                        onnx        pictures to flat vectors, as one graph
a base, with --lora PRESET              onnx, torch-export   its UNet with LoRAs as inputs
"""

import argparse
from typing import TYPE_CHECKING

from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax import model_card, storage
from hyperlora_jax.array_types import Json, Params
from hyperlora_jax.cli import arguments
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    from hyperlora_jax.hypernet.hypernetwork import Hypernetwork

OF_BASES = ("diffusers",)
OF_HYPERNETWORKS = ("jax", "pytorch", "onnx")
OF_LORA_INPUTS = ("onnx", "torch-export")
FORMATS = tuple(dict.fromkeys((*OF_HYPERNETWORKS, *OF_BASES, *OF_LORA_INPUTS)))
RANK = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, output folder, format."""
    parser.add_argument(
        "workdir", metavar="WORKDIR_OR_BASE", help="of `hyperlora pretrain` or `hyperlora train`, "
        "or a hypernetwork folder; with --lora, a base",
    )  # fmt: skip
    arguments.add_output(parser, "DIR", "folder to write")
    arguments.add_format(
        parser, FORMATS, help="default: jax of a hypernetwork, diffusers of a base"
    )
    parser.add_argument(
        "--step", type=_step, help="checkpoint: its step, or `best`; default: the newest"
    )
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), help="default: float16 of a diffusers folder, "
        "else float32",
    )  # fmt: skip
    parser.add_argument(
        "--lora", metavar="PRESET", help="of a base: its UNet as a graph that takes a LoRA of "
        "these layers for each picture (attn-qkvo, w2w, attn-ff, all)",
    )  # fmt: skip
    parser.add_argument("--rank", type=int, help=f"with --lora: of the LoRAs; default: {RANK}")
    parser.add_argument(
        "--encoder", metavar="PATH", help="of a hypernetwork: condition encoder, where it was moved"
    )


def _step(text: str) -> int | str:
    return text if text == "best" else int(text)


def run(args: argparse.Namespace) -> int:
    """Writes the folder."""
    if args.lora is not None or args.format == "torch-export":
        return _write_lora_inputs(args)
    if args.rank is not None:
        raise UserError("--rank goes with --lora PRESET, the layers whose LoRAs are inputs")
    import ml_collections

    from hyperlora_jax.hypernet.hypernetwork import Hypernetwork, is_stored
    from hyperlora_jax.train.checkpoints import restore_params

    workdir, out = epath.Path(args.workdir), epath.Path(args.out)
    if is_stored(workdir):
        hyper = Hypernetwork.restore(workdir, args.encoder)
        _write_hypernetwork(hyper, out, args)
        print(f"wrote {out}")
        return 0
    params, meta = restore_params(workdir, args.step)
    config = ml_collections.ConfigDict(meta["config"])
    if config.get("task") == "unet" or "unet" in params:
        _check_format(args, OF_BASES, "a base model")
        _write_base(workdir, config, params, meta["step"], out, args.dtype or "float16")
    elif "spec" in meta["facts"] and "encoder" in meta["facts"]:
        hyper = _hypernetwork(workdir, config, params, meta, args.encoder)
        _write_hypernetwork(hyper, out, args)
    else:
        raise UserError(
            f"{args.workdir}: its checkpoint holds {', '.join(sorted(params))}; expected the "
            "workdir of `hyperlora pretrain` (a base model) or `hyperlora train`"
        )
    print(f"wrote {out} (step {meta['step']})")
    return 0


def _write_lora_inputs(args: argparse.Namespace) -> int:
    if args.lora is None:
        raise UserError(f"--format {args.format} needs --lora PRESET, the layers that LoRAs adapt")
    if args.format not in OF_LORA_INPUTS:
        raise UserError(
            f"--lora exports a base as a graph: --format is {args.format}, expected "
            f"{' or '.join(OF_LORA_INPUTS)}"
        )
    for name in ("step", "encoder"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: is of what was trained, --lora exports a base")
    from hyperlora_jax.runtime.base_export import export_base

    rank = RANK if args.rank is None else args.rank
    spec = export_base(
        args.workdir, args.out, args.format, args.lora, rank, args.dtype or "float32"
    )
    print(f"wrote {args.out}: {len(spec)} layers, LoRAs of {spec.num_parameters:,} numbers")
    return 0


def _check_format(args: argparse.Namespace, formats: tuple[str, ...], what: str) -> None:
    if args.format not in (None, *formats):
        raise UserError(
            f"--format {args.format}: {args.workdir} holds {what}, expected {' or '.join(formats)}"
        )


def _write_base(
    workdir: epath.Path, config: ConfigDict, params: Params, step: int, out: epath.Path, dtype: str
) -> None:
    with storage.writing(out, storage.scratch(workdir)) as folder:
        if config.get("task") == "unet":
            from hyperlora_jax.stable_diffusion.embedded import load_base

            base = load_base(config.base).replace_params(params)
        else:
            from hyperlora_jax.pretrain.pretraining import assemble

            base = assemble(config, workdir, params)
        base.save_pretrained(folder, dtype=dtype)
        source = config.base if config.get("task") == "unet" else ""
        facts = {"steps": step, "data": config.data.source}
        model_card.write(folder, model_card.of_base(source, facts))


def _write_hypernetwork(hyper: "Hypernetwork", out: epath.Path, args: argparse.Namespace) -> None:
    _check_format(args, OF_HYPERNETWORKS, "a hypernetwork")
    if args.format == "pytorch":
        from hyperlora_jax.runtime.pytorch_folder import write_pytorch

        write_pytorch(hyper, out)
    elif args.format == "onnx":
        from hyperlora_jax.runtime.onnx_file import write_onnx

        write_onnx(hyper, out)
        return  # one file
    else:
        hyper.save(out, args.dtype or "float32")
    command = model_card.IN_PYTORCH if args.format == "pytorch" else model_card.IN_JAX
    card = model_card.of_hypernetwork(hyper.facts, hyper.model, args.workdir, command)
    model_card.write(out, card)


def _hypernetwork(
    workdir: epath.Path, config: ConfigDict, params: Params, meta: Json, path: str | None
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
        source = getattr(encoder, "source", "")  # one of one's own has none
        stored_encoder.checked(f"checkpoint of {workdir}", record, encoder, source)
    return Hypernetwork(generator, params, encoder, facts, model, constants)
