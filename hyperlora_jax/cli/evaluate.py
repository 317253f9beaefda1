"""`hyperlora evaluate`: scores on held-out identities, figures, report."""

import argparse

from etils import epath

from hyperlora_jax.cli.workdir_config import add_config_arguments, command_config
from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --workdir."""
    add_config_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the comparison there")
    parser.add_argument(
        "--encoder", metavar="PATH", help="condition encoder, where it has been moved"
    )


def run(args: argparse.Namespace) -> int:
    """Compares all methods and writes WORKDIR/report."""
    from hyperlora_jax.evaluate.evaluation import evaluate

    config = command_config(args, "evaluate")
    if not epath.Path(args.workdir).exists():
        raise UserError(f"--workdir {args.workdir}: does not exist, expected that of a `train`")
    file = ["--config", args.config] if args.config else []
    command = " ".join(["hyperlora evaluate", *file, "--workdir WORKDIR", *args.overrides])
    files = evaluate(config, args.workdir, args.json or "", command, args.encoder)
    print(f"wrote {files.page} and {files.metrics}")
    return 0
