"""`hyperlora generate`: checkpoint + reference images → LoRA files."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperlora_jax.cli import arguments
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    from hyperlora_jax.generate import Edits, Written
    from hyperlora_jax.lora.sites import LoraSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, references or subjects, output."""
    parser.add_argument(
        "--checkpoint", metavar="DIR", required=True,
        help="workdir of `train`, or avatar-hypernetwork, the shipped one",
    )  # fmt: skip
    parser.add_argument("--reference", metavar="IMG", nargs="+", help="pictures of one subject")
    parser.add_argument("--subjects", metavar="DIR", help="a folder of pictures per subject")
    parser.add_argument("--out", metavar="PATH", required=True, help="file, or folder for many")
    arguments.add_format(parser, help="default: the checkpoint's own")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--strength", type=float, help="default: the checkpoint's own")
    parser.add_argument("--num_samples", type=int, help="LoRAs per subject; default: its own")
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's own")
    parser.add_argument("--num_steps", type=int, help="of a diffusion generator's sampler")
    parser.add_argument("--sampler", choices=("ddim", "ancestral"), help="of diffusion generators")
    parser.add_argument("--directions", metavar="FILE", help="of `hyperlora directions`")
    parser.add_argument("--edit", metavar="NAME=AMOUNT", nargs="+", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--encoder", metavar="PATH", help="condition encoder, where it has been moved"
    )


def run(args: argparse.Namespace) -> int:
    """Writes one file per subject."""
    from hyperlora_jax import generate, model_card
    from hyperlora_jax.hypernet.hypernetwork import Hypernetwork

    if bool(args.reference) == bool(args.subjects):
        raise UserError("expected --reference IMG… for one subject or --subjects DIR for many")
    hyper = Hypernetwork.restore(args.checkpoint, args.encoder)
    own = dict(hyper.facts.get("generate", {}))
    samples = own.get("num_samples", 1) if args.num_samples is None else args.num_samples
    options = {
        "strength": args.strength,
        "seed": args.seed,
        "num_samples": samples,
        "draw": {name: getattr(args, name) for name in ("guidance", "num_steps", "sampler")},
        "edits": _edits(args, hyper.spec),
        "format": args.format or own.get("format", "kohya"),
        "dtype": args.dtype,
    }
    if args.reference:
        written = generate.generate_one(hyper, args.reference, args.out, **options)
    else:
        written = generate.generate_many(hyper, args.subjects, args.out, **options)
        names = [file.path.name for file in written]
        card = model_card.of_loras(hyper.facts, names, written[0].strength, str(options["format"]))
        model_card.write(args.out, card)
    _say(written, args.out)
    return 0


def _say(written: "Sequence[Written]", out: str) -> None:
    """What was written, at which strength, and which subjects the checkpoint does not know."""
    from hyperlora_jax.hypernet.familiarity import UNFAMILIAR

    familiarities = {
        file.subject: file.familiarity for file in written if file.familiarity is not None
    }
    scores = sorted({f"{score:.2f}" for score in familiarities.values()})
    familiar = (
        f", familiarity {' to '.join(dict.fromkeys((scores[0], scores[-1])))}" if scores else ""
    )
    what = written[0].path if len(written) == 1 else f"{len(written)} files to {out}"
    print(f"wrote {what} (strength {written[0].strength:g}{familiar})")
    if strangers := [name for name, score in familiarities.items() if score < UNFAMILIAR]:
        print(
            f"warning: {', '.join(strangers[:5])}{', …' if len(strangers) > 5 else ''}: unlike "
            f"anything this checkpoint was trained on (familiarity below {UNFAMILIAR}), "
            "the LoRA may show somebody else",
            file=sys.stderr,
        )


def _edits(args: argparse.Namespace, spec: "LoraSpec") -> "Edits | None":
    """Directions and amounts of `--edit NAME=AMOUNT …`."""
    if bool(args.edit) != bool(args.directions):
        raise UserError("--edit and --directions belong together, found only one of them")
    if not args.edit:
        return None
    from hyperlora_jax.hypernet.editing import load_directions

    amounts = {}
    for text in args.edit:
        name, _, amount = text.rpartition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            raise UserError(f"--edit {text}: expected NAME=AMOUNT, e.g. glasses=1.5") from None
    return load_directions(args.directions, spec), amounts
