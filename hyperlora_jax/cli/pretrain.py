"""`hyperlora pretrain`: trains a base model or its UNet, or one of the avatar world's encoders."""

import argparse
import importlib

from hyperlora_jax.cli.workdir_config import add_config_arguments, command_config, remembered

TASKS = {
    "base": ("pretraining", "pretrain"),
    "unet": ("unet_finetuning", "finetune_unet"),
    "avatar_encoder": ("encoder_pretraining", "pretrain_encoder"),
    "avatar_probe": ("encoder_pretraining", "pretrain_probe"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --workdir."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the config's `task`."""
    config = command_config(args, "pretrain")
    module, function = TASKS[config.task]
    train = getattr(importlib.import_module(f"hyperlora_jax.pretrain.{module}"), function)
    with remembered(args.workdir, config):
        out = train(config, args.workdir)
    print(f"wrote {out}")
    return 0
