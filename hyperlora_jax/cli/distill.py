"""`hyperlora distill`: images per concept → LoRA-target dataset."""

import argparse

from hyperlora_jax.cli.workdir_config import add_config_arguments, command_config, remembered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --workdir."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fits the LoRAs and writes WORKDIR/targets."""
    from hyperlora_jax.distill.distillation import distill

    config = command_config(args, "distill")
    with remembered(args.workdir, config):
        done = distill(config, args.workdir)
    print("\n".join(done.lines()))
    return 0
