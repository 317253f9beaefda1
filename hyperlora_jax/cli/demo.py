"""`hyperlora demo`: the whole pipeline on the embedded tiny base and avatars."""

import argparse
from pathlib import Path

from hyperlora_jax.cli.config import load_config
from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--workdir, and a config other than the demo's own."""
    parser.add_argument("--config", metavar="FILE", default=None, help="default: configs/demo.py")
    parser.add_argument("--workdir", metavar="DIR", default="demo", help="default: ./demo")


def run(args: argparse.Namespace) -> int:
    """Runs every stage; a second call goes on where the first one stopped."""
    from hyperlora_jax.evaluate.demo import demo

    demo(load_config(args.config or _default_config(), args.overrides), args.workdir)
    return 0


def _default_config() -> Path:
    path = Path(__file__).parents[2] / "configs" / "demo.py"
    if not path.is_file():
        raise UserError("--config: the demo's config is not beside the package; name it")
    return path
