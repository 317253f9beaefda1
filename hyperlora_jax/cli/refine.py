"""`hyperlora refine`: a few rank-relaxed steps on top of a generated LoRA."""

import argparse

from hyperlora_jax.cli import single_files
from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """LoRA, pictures, output, recipe."""
    parser.add_argument("lora", help="LoRA file; or a folder of NAME.safetensors")
    parser.add_argument("--images", metavar="DIR", required=True, help="pictures; or DIR/NAME/…")
    parser.add_argument("--out", metavar="PATH", required=True, help="file, or folder for many")
    parser.add_argument("--base", help="base model; default: what the LoRA's header names")
    parser.add_argument("--caption", default="", help="prompt of pictures without metadata.jsonl")
    parser.add_argument("--num_steps", type=int, default=25)
    parser.add_argument("--images_per_step", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--rank", type=int, default=4, help="of what is added")
    parser.add_argument("--keep_rank", type=int, help="cut the sum to this rank; default: exact")
    parser.add_argument("--format", choices=("kohya", "diffusers", "peft"), default="kohya")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--encoder",
        metavar="PATH",
        help="refuse a LoRA that was not generated with this condition encoder (its header names "
        "one; refining itself looks at pixels only)",
    )
    single_files.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Writes one file per LoRA."""
    from hyperlora_jax.distill.slots import Recipe
    from hyperlora_jax.refine import Refinement, refine_files
    from hyperlora_jax.stable_diffusion.embedded import load_base

    base = args.base or _base_of(args.lora)
    single_files.keep_options(base, args)
    if args.num_steps < 1 or args.images_per_step < 1:
        raise UserError(
            f"--num_steps {args.num_steps} --images_per_step {args.images_per_step}: "
            "expected at least 1"
        )
    recipe = Recipe(
        num_steps=args.num_steps,
        images_per_step=args.images_per_step,
        learning_rate=args.learning_rate,
    )
    written = refine_files(
        load_base(base),
        base,
        args.lora,
        args.images,
        args.out,
        Refinement(recipe, args.rank, args.keep_rank, args.seed),
        caption=args.caption,
        encoder=args.encoder,
        format=args.format,
        dtype=args.dtype,
    )
    print(f"wrote {written[0] if len(written) == 1 else f'{len(written)} files to {args.out}'}")
    return 0


def _base_of(lora: str) -> str:
    """The base that a LoRA's header names (that of the first file of a folder)."""
    from pathlib import Path

    from hyperlora_jax.lora_files import read_metadata

    path = Path(lora)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    name = read_metadata(files[0] if files else path).get("hyperlora.base")
    if not name:
        raise UserError(f"{lora}: its header names no base model; name it by --base")
    return name
