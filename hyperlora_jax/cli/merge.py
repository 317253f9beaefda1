"""`hyperlora merge`: weighted sums of LoRA files, at full or a smaller rank, or into a base."""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hyperlora_jax.cli import arguments, single_files
from hyperlora_jax.cli.convert import DROP_HELP, ranks
from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files with weights, output."""
    from hyperlora_jax.lora_files.writing import DTYPES

    parser.add_argument(
        "loras", metavar="LORA[=WEIGHT]", nargs="+", help="weight 1 if none is given; =-1 subtracts"
    )
    parser.add_argument("--out", required=True, help="LoRA to write, or folder with --into")
    parser.add_argument("--rank", type=int, help="best LoRA of this rank; default: exact")
    parser.add_argument("--into", metavar="BASE", help="add to a base, write a copy of it")
    arguments.add_format(parser, default="kohya", help="form of the LoRA")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    parser.add_argument("--base", help="a base, or sd1, sd2, sdxl: whose layers")
    parser.add_argument("--drop", nargs="+", default=[], metavar="WHAT", help=DROP_HELP)


def run(args: argparse.Namespace) -> int:
    """Reads, adds, writes."""
    from hyperlora_jax.lora.layer_fit import of_family
    from hyperlora_jax.lora.sites import LoraSpec
    from hyperlora_jax.lora_files import algebra, convert, load_lora, read_metadata, save_lora
    from hyperlora_jax.lora_files.base_files import BaseModel

    folder = single_files.folder_of(args.into)
    base = convert.open_base(folder or single_files.folder_of(args.base))
    model = base if isinstance(base, BaseModel) else None
    arguments.at_least_one(args, "rank")
    named = [_weighted(text) for text in args.loras]
    paths, weights = [path for path, _ in named], [weight for _, weight in named]
    loras = [load_lora(path, model, args.drop, args.rank) for path in paths]
    headers = [read_metadata(path) for path in paths]
    if model is not None:
        family = model.family
    else:
        sites = {site.path: site for _, spec in loras for site in spec.sites}
        family = base or _family(paths, headers, LoraSpec(tuple(sites.values())))
        loras = [of_family(path, *lora, family) for path, lora in zip(paths, loras, strict=True)]
    merged = algebra.merge(loras, weights, args.rank)
    spec = merged[1]
    if folder == args.into and folder:
        written = algebra.merge_into_checkpoint(folder, merged, args.out)
    elif folder:
        written = _into_single_file(Path(args.into), folder, merged, Path(args.out))
    else:
        layers = model.layers_per_block if model else 2
        texts = _shared(headers)
        written = save_lora(args.out, *merged, args.format, args.dtype, family, texts, layers)
    print(f"wrote {written}: {len(spec)} sites, {ranks(spec)}")
    return 0


def _into_single_file(source: Path, folder: str, merged, out: Path) -> Path:
    """A single file like the source where `out` is one, or else a diffusers directory."""
    from hyperlora_jax.lora_files.algebra import merge_into_checkpoint
    from hyperlora_jax.stable_diffusion.weights.single_file import packed

    if out.suffix != ".safetensors":
        return merge_into_checkpoint(folder, merged, out)
    if out.exists():
        raise UserError(f"{out}: already exists, expected a new file")
    changed = out.with_name(f".{out.name}.folder")
    shutil.rmtree(changed, ignore_errors=True)
    try:
        return packed(source, merge_into_checkpoint(folder, merged, changed), out)
    finally:
        shutil.rmtree(changed, ignore_errors=True)


def _weighted(text: str) -> tuple[str, float]:
    path, sign, weight = text.rpartition("=")
    if not sign:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise UserError(f"{text}: expected LORA=WEIGHT, e.g. anna.safetensors=0.7") from None


# Own texts that are true of a sum too; how one of its parts was generated is not.
_OF_SUMS = ("base", "base_hash", "prediction_type", "encoder_hash")


def _shared(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Texts that all files agree on: about their base, and the owner's."""
    from hyperlora_jax.lora_files.header import PREFIX, carried

    first, *others = map(carried, headers)
    return {
        key: text
        for key, text in first.items()
        if (not key.startswith(PREFIX) or key.removeprefix(PREFIX) in _OF_SUMS)
        and all(other.get(key) == text for other in others)
    }


def _family(paths: Sequence[str], headers: Sequence[Mapping[str, str]], spec) -> str:
    """The family that the files' headers name, or else their sites."""
    from hyperlora_jax.lora_files import header as family

    said = {}
    for path, header in zip(paths, headers, strict=True):
        try:
            if named := family.declared(header):
                said.setdefault(named[0], path)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    if len(said) > 1:
        both = ", ".join(f"{path} is for {name}" for name, path in said.items())
        raise UserError(f"{both}; LoRAs of different families cannot be merged")
    return next(iter(said), None) or family.recognise(spec)[0]
