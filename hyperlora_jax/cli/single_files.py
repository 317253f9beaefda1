"""Single files as bases: options for what they do not say, folders for commands that read those."""

import argparse
from pathlib import Path

from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a single file's tensors do not tell."""
    group = parser.add_argument_group("where the base is a single file (given once, then kept)")
    group.add_argument("--tokenizer", metavar="DIR", help="tokenizer; default: the family's")
    group.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction", "sample"),
        help="what it predicts; default: as its marks say",
    )


def keep_options(base: str, args: argparse.Namespace) -> None:
    """Unpacks the single file `base` with the options, where any is given.

    Raises:
        UserError: the base is no single file.
    """
    given = {"prediction_type": args.prediction_type, "tokenizer": args.tokenizer}
    if not any(given.values()):
        return
    from hyperlora_jax.stable_diffusion.weights import families, single_file

    if not families.is_base(base):
        name = next(name for name, value in given.items() if value)
        raise UserError(f"--{name}: is for bases that are single files, {base} is none")
    single_file.unpacked(Path(base), **given)


def folder_of(base: str | None) -> str | None:
    """`base`, or the folder that a single file is unpacked to."""
    if base is None or not base.endswith((".safetensors", ".ckpt")) or not Path(base).is_file():
        return base
    from hyperlora_jax.stable_diffusion.weights.single_file import unpacked

    return str(unpacked(Path(base)))
