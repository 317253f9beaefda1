"""`hyperlora import`: LoRA files and weights2weights matrices -> LoRA-target dataset."""

import argparse
import os

from hyperlora_jax.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sources, base, layout of the dataset, and what to do with LoRAs of other layers or ranks."""
    parser.add_argument("paths", nargs="+", help="LoRA files, folders of them, or matrices")
    parser.add_argument("--base", required=True, help="diffusers directory that they belong to")
    parser.add_argument("--out", required=True, help="dataset folder to write")
    parser.add_argument(
        "--preset",
        help="layers: w2w, attn-qkvo, attn-ff, all (default: those of the first sound file; "
        "w2w for a matrix)",
    )
    parser.add_argument("--rank", type=int, help="of the dataset (default: as the layers' source)")
    parser.add_argument("--missing", choices=("error", "zero"), default="error",
                        help="layers that a LoRA lacks (default error: quarantine)")  # fmt: skip
    parser.add_argument("--extra", choices=("error", "drop"), default="error",
                        help="layers beyond the preset (default error: quarantine)")  # fmt: skip
    parser.add_argument("--identities", metavar="FILE",
                        help="CSV with columns id, identity, or JSON object")  # fmt: skip
    parser.add_argument("--alpha", type=float, default=27.0,
                        help="of a matrix' factors (default 27, weights2weights)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)),
                        help="processes that parse files (default: one per core)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset at --out")


def run(args: argparse.Namespace) -> int:
    """Imports, prints what was taken, lost and left out."""
    from hyperlora_jax.stable_diffusion.model import StableDiffusion
    from hyperlora_jax.targets import lora_import
    from hyperlora_jax.targets.lora_sources import FileReader

    arguments.at_least_one(args, "workers")
    base = StableDiffusion.outline(args.base)
    spec = lora_import.choose_spec(args.paths, base, args.preset, args.rank)
    print(
        f"layers: {len(spec)} sites, rank {spec.max_rank}, {spec.num_parameters:,} numbers per LoRA"
    )
    report = lora_import.import_loras(
        args.paths,
        args.out,
        FileReader(spec, base.base_hash, args.missing, args.extra, args.alpha),
        identities=lora_import.read_identities(args.identities) if args.identities else None,
        lora_dtype=args.dtype,
        num_workers=args.workers,
        overwrite=args.overwrite,
    )
    print("\n".join(report.lines()))
    return 0
