"""`hyperlora export`: the newest checkpoint of a workdir as files that others read.

A `pretrain` workdir becomes a diffusers directory, a `train` workdir a hypernetwork folder.
"""

import argparse

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Workdir and output folder."""
    parser.add_argument("workdir", help="workdir of `hyperlora pretrain` or `hyperlora train`")
    parser.add_argument("out", help="folder to write")
    parser.add_argument(
        "--step", type=_step, help="checkpoint: its step, or `best`; default: the newest"
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")


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
        from hyperlora_jax.train.pretraining import assemble

        with storage.writing(out, storage.scratch(workdir)) as folder:
            assemble(config, workdir, params).save_pretrained(folder, dtype=args.dtype)
    elif "spec" in meta["facts"] and "encoder" in meta["facts"]:
        from hyperlora_jax.hypernet.building import architecture, build_generator
        from hyperlora_jax.hypernet.conditioning import load_condition_encoder
        from hyperlora_jax.hypernet.model import FOLDER, Hypernetwork
        from hyperlora_jax.stable_diffusion.embedded import load_base

        spec = load_base(config.base).lora_spec(config.model.preset, config.model.rank)
        model = architecture(config.model)
        generator, constants = build_generator(spec, model), {}
        if generator.needs_targets:
            # Statistics (and the VAE) of the dataset are no part of a training checkpoint.
            constants = dict(Hypernetwork.restore(workdir / FOLDER).constants)
        encoder = load_condition_encoder(config.model.encoder)
        facts = {**meta["facts"], "num_steps": meta["step"]}
        Hypernetwork(generator, params, encoder, facts, model, constants).save(out)
    else:
        raise UserError(
            f"{args.workdir}: its checkpoint holds {', '.join(sorted(params))}; expected the "
            "workdir of `hyperlora pretrain` (a base model) or `hyperlora train`"
        )
    print(f"wrote {out} (step {meta['step']})")
    return 0
