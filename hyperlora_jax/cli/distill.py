"""`hyperlora distill`: images per concept → LoRA-target dataset."""

import argparse

from hyperlora_jax.cli.config import add_config_arguments, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --workdir."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fits the LoRAs and writes WORKDIR/targets."""
    from hyperlora_jax.distill.run import distill

    config = load_config(args.config, args.overrides)
    print(f"wrote {distill(config, args.workdir)}")
    return 0
