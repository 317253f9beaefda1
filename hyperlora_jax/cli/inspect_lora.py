"""`hyperlora inspect LORA`: form, sites, ranks, norms, spectrum, and which tools load it."""

import argparse
import json

from hyperlora_jax.cli import single_files
from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file and how much to show."""
    parser.add_argument("path", help="LoRA file or adapter folder")
    parser.add_argument("--base", help="diffusers directory, single file, or sd1, sd2, sdxl")
    parser.add_argument("--sites", action="store_true", help="one line for each site")
    parser.add_argument("--verify", action="store_true", help="load it with PyTorch (--base DIR)")
    parser.add_argument("--json", metavar="FILE", help="write the whole report")


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    from hyperlora_jax.lora_files import compatibility, safetensors_io
    from hyperlora_jax.lora_files.compatibility import inspect_lora
    from hyperlora_jax.lora_files.header import FAMILIES

    facts = inspect_lora(args.path, single_files.folder_of(args.base))
    ranks = sorted({site["rank"] for site in facts["sites"] if site["rank"] is not None})
    told = f"{facts['form']} keys, {facts['family']} ({facts['evidence']})"
    print(f"{'kind':<12}{facts['kind']}, {told}")
    print(f"{'sites':<12}{len(facts['sites'])}, {facts['num_parameters']:,} numbers")
    print(f"{'ranks':<12}{', '.join(map(str, ranks)) or 'none (whole matrices)'}")
    print(f"{'dtypes':<12}{', '.join(facts['dtypes'])}")
    if "norm" in facts:
        print(f"{'delta norm':<12}{facts['norm']:.4g}")
        print(f"{'spectrum':<12}{facts['effective_rank']:.2f} effective rank on average")
        print(f"{'spec':<12}{facts['fingerprint'][:12]}")
    for key, text in sorted(facts["metadata"].items()):
        print(f"  {key} = {text[:100]}")
    for note in facts["notes"]:
        print(f"note: {note}")
    if args.sites:
        for site in facts["sites"]:
            sigmas = [f"{value:.3g}" for value in site.get("singular_values", ())[:6]]
            size = f"  {site['size']}" if "size" in site else f"  {site['kind']}"
            print(f"  {site['path']}{size}  rank {site['rank']}  {' '.join(['σ', *sigmas])}")
    if facts["tools"]:
        print("loads in")
        rows = [compatibility.ToolReport(**row) for row in facts["tools"]]
        print("\n".join(compatibility.lines(rows, len(facts["sites"]))))
    if args.verify:
        from hyperlora_jax.lora_files.reading import load_lora
        from hyperlora_jax.lora_files.verify import load_modules, verify_source

        if args.base is None or args.base in FAMILIES:
            raise UserError("--verify needs --base DIR, a diffusers directory to load it into")
        print(verify_source(args.path, load_modules(args.base), *load_lora(args.path)))
    if args.json:
        text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
        safetensors_io.atomic_write(args.json, text.encode())
    return 0
