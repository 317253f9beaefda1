"""`hyperlora train`: LoRA-target dataset and images → hypernetwork."""

import argparse

from hyperlora_jax.cli.workdir_config import add_config_arguments, command_config, remembered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --workdir."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, or goes on where an earlier run of the same workdir stopped."""
    from hyperlora_jax.hypernet.model import FOLDER
    from hyperlora_jax.train.hypernet_training import train_hypernetwork

    config = command_config(args, "train")
    with remembered(args.workdir, config):
        train_hypernetwork(config, args.workdir)
    print(f"wrote {args.workdir}/{FOLDER}")
    return 0
