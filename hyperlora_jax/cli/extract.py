"""`hyperlora extract`: what a fine-tuned model learned, as a LoRA of its base."""

import argparse

from hyperlora_jax.cli import arguments, single_files
from hyperlora_jax.cli.convert import ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two models, output."""
    from hyperlora_jax.lora.sites import PRESETS
    from hyperlora_jax.lora_files.writing import DTYPES

    parser.add_argument("base", metavar="BASE", help="diffusers directory or single file")
    parser.add_argument("tuned", metavar="TUNED", help="the tuned model, likewise")
    parser.add_argument("--out", required=True, help="LoRA to write")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--preset", choices=sorted(set(PRESETS) - {"text"}), default="attn-ff")
    arguments.add_format(parser, default="kohya", help="form of the LoRA")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")


def run(args: argparse.Namespace) -> int:
    """SVD layer by layer, then one file."""
    from hyperlora_jax.lora.sites import site_factors
    from hyperlora_jax.lora_files import algebra, save_lora
    from hyperlora_jax.lora_files.base_files import read_base_model

    arguments.at_least_one(args, "rank")
    base, tuned = single_files.folder_of(args.base), single_files.folder_of(args.tuned)
    model = read_base_model(base)
    lora, spec = algebra.extract(base, tuned, args.rank, args.preset)
    written = save_lora(
        args.out, lora, spec, args.format, args.dtype, model.family, None, model.layers_per_block
    )
    print(f"wrote {written}: {len(spec)} sites, {ranks(spec)}")
    if not any(site_factors(lora, site)["up"].any() for site in spec.sites):
        print("both models are the same in these layers: it changes nothing")
    if any(site.component != "unet" for site in model.layers.values()):
        print("changes of text encoders are not in it, only those of the UNet")
    return 0
