"""`hyperlora inspect`: looks at a path, says what it is and what it holds."""

import argparse
import importlib
from pathlib import Path

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.cli import inspect_workdir, single_files
from hyperlora_jax.cli.arguments import OneLineParser
from hyperlora_jax.errors import UserError
from hyperlora_jax.shipped import base_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The path comes first; the other options depend on what it is."""
    parser.add_argument("path", help="LoRA, dataset, hypernetwork, workdir or base (tiny-sd, too)")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options for that kind of thing")


def kind_of(path: epath.Path) -> str:
    """ "dataset", "hypernetwork", "workdir", "base" or "lora".

    Raises:
        UserError: there is nothing at the path.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / "metadata.json").exists() and (path / "index.json").exists():
        return "dataset"
    if any((path / name).exists() for name in ("unet/config.json", "model_index.json")):
        return "base"
    if inspect_workdir.is_workdir(path):
        return "workdir"
    if (path / "model.safetensors").exists() and (path / "config.json").exists():
        return "hypernetwork"
    return "lora"


def needs_jax(args: argparse.Namespace) -> bool:
    """Whether JAX works on what lies there; LoRA files and the journals of runs need none."""
    return _found(args.path)[1] not in ("lora", "workdir")


def _found(given: str) -> tuple[epath.PathLike, str]:
    """The path, a copy of it where it is one file in a bucket, and what kind of thing is there."""
    path = epath.Path(storage.place(base_path(given)))
    with storage.asking(path):
        kind = kind_of(path)
    if kind == "lora" and str(path).endswith((".safetensors", ".ckpt")):
        from hyperlora_jax.stable_diffusion.weights.families import is_base

        path = storage.fetched(path)
        kind = "base" if is_base(path) else kind
    return path, kind


def run(args: argparse.Namespace) -> int:
    """Hands over to the command for that kind."""
    path, kind = _found(args.path)
    if kind == "base":
        return _base(storage.fetched(path), args.options)
    if kind == "lora":
        path = storage.fetched(path)
    module = importlib.import_module(f"hyperlora_jax.cli.inspect_{kind}")
    parser = OneLineParser(prog=f"hyperlora inspect {path}")
    module.add_arguments(parser)
    try:
        args = parser.parse_args([str(path), *args.options])
    except SystemExit as stop:
        return int(stop.code or 0)
    return module.run(args)


def _base(path: Path, options: list[str]) -> int:
    parser = OneLineParser(prog=f"hyperlora inspect {path}")
    parser.add_argument(
        "--verify", action="store_true", help="compare one forward pass with PyTorch diffusers"
    )
    parser.add_argument("--variant", help="fp16 reads *.fp16.safetensors")
    single_files.add_arguments(parser)
    try:
        args = parser.parse_args(options)
    except SystemExit as stop:
        return int(stop.code or 0)
    single_files.keep_options(str(path), args)
    path = Path(str(single_files.folder_of(str(path))))
    if args.verify:
        return _verify_base(path, args.variant)
    import jax

    from hyperlora_jax.stable_diffusion.model import StableDiffusion

    sd = StableDiffusion.from_pretrained(path, variant=args.variant)
    print(f"{'kind':<16}Stable Diffusion base")
    for name, params in sd.params.items():
        print(f"{name:<16}{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")
    print(f"{'prediction':<16}{sd.schedule.prediction_type}")
    print(f"{'hash':<16}{sd.base_hash}")
    return 0


def _verify_base(path: Path, variant: str | None) -> int:
    """0 when every output of every component equals PyTorch's, else 1."""
    from hyperlora_jax.stable_diffusion.pytorch_parity import TOLERANCE, compare

    same = True
    for part in compare(path, variant):
        verdict = "equals PyTorch" if part.ok else f"DIFFERS (tolerance {TOLERANCE:g})"
        print(
            f"{part.output:<18}max error {part.relative_error:.1e} of max {part.max_abs:.3g}: "
            f"{verdict}",
            flush=True,
        )
        same &= part.ok
    return 0 if same else 1
