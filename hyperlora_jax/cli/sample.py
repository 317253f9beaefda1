"""`hyperlora sample`: images from a base model and LoRAs, in JAX."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Base, prompts, LoRAs, sampler settings."""
    parser.add_argument("base", help="diffusers directory, hub id or tiny-sd")
    parser.add_argument("--prompt", nargs="+", required=True)
    parser.add_argument("--negative_prompt", help="for all pictures; needs --guidance")
    parser.add_argument("--lora", metavar="FILE", nargs="*", default=[], help="one picture each")
    parser.add_argument(
        "--strength", type=float, nargs="+", default=[1.0], help="one for all LoRAs, or one each"
    )
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", required=True)


def run(args: argparse.Namespace) -> int:
    """Writes one PNG per LoRA (or one without) and prompt."""
    strengths = _strengths(args)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror})") from error
    negative = args.negative_prompt
    if negative is not None and args.guidance == 1.0:
        raise UserError("--negative_prompt does nothing at --guidance 1; give another --guidance")
    import jax
    import numpy as np

    from hyperlora_jax.data.pictures import encode_png
    from hyperlora_jax.lora import factors
    from hyperlora_jax.lora_files import load_lora
    from hyperlora_jax.stable_diffusion.embedded import load_base

    sd = load_base(args.base)
    loras = [load_lora(path, sd)[0] for path in args.lora]
    names = _names(args.lora)
    prompts = [prompt for _ in names for prompt in args.prompt]
    images = sd.sample(
        jax.random.key(args.seed),
        prompts,
        lora=factors.stack_padded(loras) if loras else None,
        strength=np.asarray(strengths, np.float32),
        num_steps=args.num_steps,
        guidance=args.guidance,
        negative_prompts=None if negative is None else [negative] * len(prompts),
        sampler=args.sampler,
    )
    pixels = np.uint8(np.asarray(images) * 255.0 + 0.5)
    for k, picture in enumerate(pixels):
        name = f"{names[k // len(args.prompt)]}_{k % len(args.prompt):02d}.png"
        (out / name).write_bytes(encode_png(picture))
    print(f"wrote {len(pixels)} pictures to {out}")
    return 0


def _strengths(args: argparse.Namespace) -> list[float] | float:
    """One number for all LoRAs, or one for each."""
    if len(args.strength) == 1:
        return args.strength[0]
    if len(args.strength) != len(args.lora):
        raise UserError(
            f"--strength: {len(args.strength)} numbers for {len(args.lora)} LoRAs, expected one, or"
            " one for each"
        )
    return args.strength


def _names(paths: Sequence[str]) -> list[str]:
    """A name for the pictures of each LoRA: its file's, numbered where two files share it."""
    stems = [Path(path).stem for path in paths] or ["base"]
    return [
        stem if stems.count(stem) == 1 else f"{stem}-{stems[:i].count(stem) + 1}"
        for i, stem in enumerate(stems)
    ]
