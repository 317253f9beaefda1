"""`hyperlora demo`: the whole pipeline on the embedded tiny base and avatars."""

import argparse

from hyperlora_jax.cli import config_checks
from hyperlora_jax.cli.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--workdir, and a config other than the demo's own."""
    parser.add_argument("--config", metavar="FILE", default="demo", help="default: configs/demo.py")
    parser.add_argument("--workdir", metavar="DIR", default="demo", help="default: ./demo")


def run(args: argparse.Namespace) -> int:
    """Runs every stage; a second call goes on where the first one stopped."""
    from hyperlora_jax.demo import demo

    config = load_config(args.config, args.overrides)
    config_checks.check(config, "demo", args.config)
    demo(config, args.workdir)
    return 0
