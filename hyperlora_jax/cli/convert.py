"""`hyperlora convert`: LoRA files from one program's form into another's, one or a folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hyperlora_jax.cli import arguments, single_files
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    from hyperlora_jax.lora.sites import LoraSpec

DROP_HELP = (
    "leave out layers by parts of their paths (conv_in, time_embedding, text_encoder), or "
    "differences (of biases and norms, which no LoRA carries)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Input, output, form."""
    from hyperlora_jax.lora.other_kinds import DEFAULT_RANK
    from hyperlora_jax.lora_files.writing import DTYPES

    parser.add_argument("source", metavar="IN", help="LoRA file, adapter folder, or folder of them")
    arguments.add_output(parser, "PATH", "file or folder to write")
    arguments.add_format(parser, required=True, help="form of the output")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    parser.add_argument("--base", help="a base, or sd1, sd2, sdxl; default: told from the layers")
    parser.add_argument(
        "--rank",
        type=int,
        help="highest rank of a layer (default: the file's; with --base DIR LoHa, LoKr and DoRA "
        f"become a LoRA too, by default of rank {DEFAULT_RANK})",
    )
    parser.add_argument("--drop", nargs="+", default=[], metavar="WHAT", help=DROP_HELP)
    parser.add_argument(
        "--verify", action="store_true", help="load source and result with PyTorch too"
    )
    parser.add_argument("--workers", type=int, help="files at a time (default: two per core)")


def run(args: argparse.Namespace) -> int:
    """Converts, prints what came out and which tools load it."""
    from hyperlora_jax.lora_files import compatibility, convert
    from hyperlora_jax.lora_files.base_files import BaseModel

    source, args.base = Path(args.source), single_files.folder_of(args.base)
    base = convert.open_base(args.base)
    if args.verify and not isinstance(base, BaseModel):
        raise UserError("--verify needs --base DIR, a diffusers directory to load the LoRA into")
    arguments.at_least_one(args, "workers", "rank")
    if source.is_dir() and not convert.is_one_lora(source):
        done = _folder(args, base)
    else:
        reading = {"drop": args.drop, "rank": args.rank}
        done = [convert.convert_file(source, args.out, args.format, args.dtype, base, **reading)]
    good = [result for result in done if not result.error]
    if args.verify:
        _verify(args.base, good, args.drop)
    if good:
        first = good[0]
        print(f"wrote {len(good)} LoRA(s), e.g. {first.target}")
        print(f"{len(first.spec)} sites, {ranks(first.spec)}, {first.family}"
              f" ({first.evidence})")  # fmt: skip
        form = compatibility.written_form(args.format, first.family)
        rows = compatibility.report(first.spec, first.family, form)
        print("\n".join(compatibility.lines(rows, len(first.spec))))
    bad = [result for result in done if result.error]
    for result in bad:
        print(f"left out: {result.error}")
    if bad:
        raise UserError(f"{len(bad)} of {len(done)} LoRAs could not be converted, see above")
    return 0


def ranks(spec: "LoraSpec") -> str:
    """ "rank 4", or "ranks 2 to 16" where sites differ."""
    lowest = min(site.rank for site in spec.sites)
    return f"rank {lowest}" if lowest == spec.max_rank else f"ranks {lowest} to {spec.max_rank}"


def _folder(args: argparse.Namespace, base) -> list:
    from tqdm import tqdm

    from hyperlora_jax.lora_files import convert

    total = len(convert.find_loras(Path(args.source)))
    with tqdm(total=total, unit="LoRA", desc="convert") as bar:
        return convert.convert_folder(
            args.source, args.out, args.format, args.dtype, base, args.workers,
            lambda result: bar.update(), drop=args.drop, rank=args.rank,
        )  # fmt: skip


def _verify(base: str, done: list, drop: list[str]) -> None:
    from tqdm import tqdm

    from hyperlora_jax.lora_files.keys import other_layers
    from hyperlora_jax.lora_files.reading import load_lora, read_tensors
    from hyperlora_jax.lora_files.verify import load_modules, verify, verify_source

    modules = load_modules(base)
    worst_output = worst_delta = 0.0
    for result in tqdm(done, unit="LoRA", desc="verify"):
        if other_layers(read_tensors(result.source)[0] if result.source.suffix != ".npy" else ()):
            tqdm.write(f"source {result.source}: no plain LoRA, not compared")
        elif result.source.suffix != ".npy":
            meant = load_lora(result.source, None, drop)
            tqdm.write(f"source {verify_source(result.source, modules, *meant)}")
        verified = verify(result.target, modules, *load_lora(result.target))
        problems = [*verified.missing_keys, *verified.unexpected_keys, *verified.warnings]
        if problems:
            raise UserError(f"{result.target}: PyTorch says: {problems[0]}")
        worst_output = max(worst_output, verified.max_abs_diff)
        worst_delta = max(worst_delta, verified.max_delta_error)
        if verified.max_delta_error > 1e-5 or verified.max_abs_diff > 1e-3:
            raise UserError(
                f"{result.target}: PyTorch differs: delta {verified.max_delta_error:.1e}, output "
                f"{verified.max_abs_diff:.1e}"
            )
    print(
        f"PyTorch: {len(done)} loaded, no missing and no unexpected key, largest difference of "
        f"deltas {worst_delta:.1e}, of outputs {worst_output:.1e}"
    )
