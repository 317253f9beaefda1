"""`hyperlora sample`: images from a base model and LoRAs, in JAX."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Base, prompts, LoRAs, sampler settings."""
    parser.add_argument("base", help="diffusers directory, hub id or tiny-sd")
    parser.add_argument("--prompt", nargs="+", required=True)
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--lora", metavar="FILE", nargs="*", default=[], help="one picture each")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", required=True)


def run(args: argparse.Namespace) -> int:
    """Writes one PNG per LoRA (or one without) and prompt."""
    import jax
    import numpy as np

    from hyperlora_jax.data.pictures import encode_png
    from hyperlora_jax.lora import factors
    from hyperlora_jax.lora_files import load_lora
    from hyperlora_jax.stable_diffusion.embedded import load_base

    sd = load_base(args.base)
    loras = [load_lora(path, sd)[0] for path in args.lora]
    names = [Path(path).stem for path in args.lora] or ["base"]
    prompts = [prompt for _ in names for prompt in args.prompt]
    images = sd.sample(
        jax.random.key(args.seed),
        prompts,
        lora=factors.stack(loras) if loras else None,
        strength=args.strength,
        num_steps=args.num_steps,
        guidance=args.guidance,
        negative_prompts=[args.negative_prompt] * len(prompts),
        sampler=args.sampler,
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pixels = np.uint8(np.asarray(images) * 255.0 + 0.5)
    for k, picture in enumerate(pixels):
        name = f"{names[k // len(args.prompt)]}_{k % len(args.prompt):02d}.png"
        (out / name).write_bytes(encode_png(picture))
    print(f"wrote {len(pixels)} pictures to {out}")
    return 0
