"""`hyperlora inspect DATASET`: what a LoRA-target dataset holds."""

import argparse
import json

from hyperlora_jax import storage
from hyperlora_jax.cli import arguments
from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The dataset, how much of it to measure, and where to write more."""
    parser.add_argument("path", help="dataset folder")
    parser.add_argument("--limit", type=int, help="measure that many LoRAs, drawn at random")
    parser.add_argument("--json", metavar="FILE", help="write the whole report, every site in it")
    parser.add_argument("--sheet", metavar="FILE", help="write a picture of the first references")


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    from PIL import Image

    from hyperlora_jax.targets import dataset_inspection
    from hyperlora_jax.targets.lora_targets import open_lora_targets

    arguments.at_least_one(args, "limit")
    targets = open_lora_targets(args.path)
    report = dataset_inspection.inspect_targets(targets, args.limit)
    print("\n".join(dataset_inspection.report_lines(report)))
    try:
        if args.json:
            storage.replaced(storage.place(args.json), json.dumps(report, indent=2).encode())
            print(f"wrote {args.json}")
        if args.sheet:
            sheet = dataset_inspection.contact_sheet(targets)
            if sheet is None:
                raise UserError(f"--sheet: {args.path} has no pictures")
            with storage.output(args.sheet) as file:
                Image.fromarray(sheet).save(file)
            print(f"wrote {args.sheet}")
    except (OSError, ValueError) as error:
        raise UserError(f"{args.json or args.sheet}: cannot be written ({error})") from None
    return 0
