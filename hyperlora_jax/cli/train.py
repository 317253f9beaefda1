"""`hyperlora train`: LoRA-target dataset and images → hypernetwork."""

import argparse

from etils import epath

from hyperlora_jax.cli.workdir_config import add_config_arguments, command_config, remembered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --workdir."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, or goes on where an earlier run of the same workdir stopped."""
    from hyperlora_jax.hypernet.hypernetwork import FOLDER
    from hyperlora_jax.train.checkpoints import complete_steps
    from hyperlora_jax.train.hypernetwork.hypernet_training import train_hypernetwork

    config = command_config(args, "train")
    before = max(complete_steps(epath.Path(args.workdir) / "checkpoints"), default=0)
    with remembered(args.workdir, config):
        train_hypernetwork(config, args.workdir)
    out = f"{args.workdir}/{FOLDER}"
    if before >= config.train.num_steps:
        print(f"already at step {before}: {out}; more by --config.train.num_steps")
    else:
        print(f"wrote {out} (step {config.train.num_steps})")
    return 0
