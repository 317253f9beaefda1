"""`hyperlora sample`: images from a base model and LoRAs, in JAX."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperlora_jax.cli import arguments, single_files
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from hyperlora_jax.array_types import Params
    from hyperlora_jax.stable_diffusion.model import StableDiffusion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Base, prompts, LoRAs, sampler settings."""
    parser.add_argument("base", help="diffusers directory, single file, hub id or tiny-sd")
    parser.add_argument("--prompt", nargs="+", required=True)
    parser.add_argument("--negative_prompt", help="for all pictures; needs --guidance")
    parser.add_argument("--lora", metavar="FILE", nargs="*", default=[], help="one picture each")
    parser.add_argument(
        "--strength", type=float, nargs="+", default=[1.0], help="one for all LoRAs, or one each"
    )
    parser.add_argument(
        "--region",
        metavar="PLACE[:FILE]",
        nargs="+",
        action="extend",
        default=[],
        help="a LoRA in a part of the picture, several in one: left, right, top, bottom, all, a box"
        " x0,y0,x1,y1 in fractions, or the picture of a mask; without FILE the base",
    )
    parser.add_argument(
        "--region_prompt", metavar="TEXT", nargs="+", help="one for each region; default: --prompt"
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="keep self-attention, norms and convolutions within regions: people mix less, borders"
        " show more; a picture takes longer",
    )
    parser.add_argument(
        "--lora_branches",
        default="both",
        help="of guidance that LoRAs act on: both (the default, as in other programs), or"
        " conditional (the negative prompt is the base's), for bases that need little guidance",
    )
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="default: the base's own, mostly 7.5")
    parser.add_argument(
        "--sampler",
        help="ddim, euler, euler_a, dpmpp_2m, pndm, unipc, lcm or tcd; default: the base's own",
    )
    parser.add_argument(
        "--clip_skip",
        type=int,
        default=0,
        help='last layers of the text encoder to leave out; 1 is "clip skip 2" elsewhere',
    )
    parser.add_argument("--height", type=int, help="in pixels; default: the base's own")
    parser.add_argument("--width", type=int, help="in pixels; default: the base's own")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", required=True)
    single_files.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Writes one PNG per LoRA (or one without, or one of all regions) and prompt, and a sheet of
    all, magnified."""
    areas = _areas(args)
    strengths = _strengths(args, [file for _, file in areas] or args.lora)
    out = Path(args.out)
    arguments.at_least_one(args, "batch_size")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror})") from error
    import numpy as np

    from hyperlora_jax.pictures.pictures import contact_sheet, save_images
    from hyperlora_jax.stable_diffusion.embedded import load_base
    from hyperlora_jax.stable_diffusion.networks.lora_argument import lora_tree

    single_files.keep_options(args.base, args)
    sd = load_base(args.base)
    regions = _regions(args, areas, sd, strengths) if areas else []
    names = ["regions"] if regions else _names(args.lora)
    prompts = [prompt for _ in names for prompt in args.prompt]
    images = sample_in_batches(
        sd,
        args.seed,
        prompts,
        args.batch_size,
        lora=lora_tree(args.lora, sd),
        strengths=np.broadcast_to(np.float32(1.0 if regions else strengths), len(names)),
        height=args.height,
        width=args.width,
        num_steps=args.num_steps,
        guidance=args.guidance,
        negative_prompts=args.negative_prompt,
        sampler=args.sampler,
        clip_skip=args.clip_skip,
        regions=regions,
        apart=args.apart,
        lora_branches=args.lora_branches,
    )
    files = [
        out / f"{names[k // len(args.prompt)]}_{k % len(args.prompt):02d}.png"
        for k in range(len(prompts))
    ]
    save_images(files, images)
    save_images(out / "contact_sheet.png", contact_sheet(images, len(args.prompt)))
    print(f"wrote {len(files)} pictures to {out}")
    return 0


def sample_in_batches(
    sd: "StableDiffusion",
    seed: int,
    prompts: Sequence[str],
    batch_size: int,
    *,
    lora: "Params | None",
    strengths: "Sequence[float] | np.ndarray",
    height: int | None,
    width: int | None,
    **options: Any,
) -> "np.ndarray":
    """Pictures [b, h, w, 3] of b prompts, some at a time; the same ones whatever `batch_size` is.

    Noise belongs to a prompt's place: every LoRA draws a prompt from the same noise, and one more
    prompt or LoRA changes no other picture.

    Args:
        lora: with a leading axis l for several: every one serves b / l prompts in a row.
        strengths: one per LoRA.
        **options: of `StableDiffusion.sample`.
    """
    import jax
    import numpy as np

    from hyperlora_jax.lora import factors

    per_lora = len(prompts) // len(strengths)
    own_keys = [jax.random.fold_in(jax.random.key(seed), place) for place in range(per_lora)]
    noise = np.concatenate([sd.noise(key, 1, height, width) for key in own_keys])
    # Of what samplers add.
    keys = jax.numpy.stack([jax.random.fold_in(key, 1) for key in own_keys])
    batch_size = min(batch_size, len(prompts))
    parts = []
    for start in range(0, len(prompts), batch_size):
        # The last batch is filled up: one program for all.
        rows = np.minimum(np.arange(start, start + batch_size), len(prompts) - 1)
        places, own = rows % per_lora, None
        if lora is not None:
            which = rows // per_lora
            own = factors.scale(factors.index(lora, which), np.asarray(strengths)[which])
        asked = [prompts[k] for k in rows]
        images = sd.sample(keys[places], asked, lora=own, latents=noise[places], **options)
        parts.append(np.asarray(images))
    return np.concatenate(parts)[: len(prompts)]


def _strengths(args: argparse.Namespace, files: Sequence[str]) -> list[float] | float:
    """One number for all LoRAs, or one for each."""
    if len(args.strength) == 1:
        return args.strength[0]
    if len(args.strength) != len(files):
        raise UserError(
            f"--strength: {len(args.strength)} numbers for {len(files)} LoRAs, expected one, or"
            " one for each"
        )
    return args.strength


def _areas(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(place, LoRA file) of each region, "" for no LoRA."""
    for name in ("region_prompt", "apart"):
        if getattr(args, name) and not args.region:
            raise UserError(f"--{name}: found no --region, expected one or more")
    if args.lora and args.region:
        raise UserError("--lora and --region: found both, expected all:FILE as a region instead")
    given = args.region_prompt
    if given is not None and len(given) != len(args.region):
        raise UserError(
            f"--region_prompt: {len(given)} for {len(args.region)} regions, expected one for each"
        )
    return [region.partition(":")[::2] for region in args.region]


def _regions(
    args: argparse.Namespace,
    areas: Sequence[tuple[str, str]],
    sd: "StableDiffusion",
    strengths: list[float] | float,
) -> list[Any]:
    """The regions of all pictures, LoRA files read."""
    from hyperlora_jax.stable_diffusion.networks.lora_argument import lora_tree
    from hyperlora_jax.stable_diffusion.picture_regions import Region

    prompts = args.region_prompt or [None] * len(areas)
    each = strengths if isinstance(strengths, list) else [strengths] * len(areas)
    return [
        Region(place, lora_tree(file or None, sd), prompt, strength)
        for (place, file), prompt, strength in zip(areas, prompts, each, strict=True)
    ]


def _names(paths: Sequence[str]) -> list[str]:
    """A name for the pictures of each LoRA: its file's, numbered where two files share it."""
    stems = [Path(path).stem for path in paths] or ["base"]
    return [
        stem if stems.count(stem) == 1 else f"{stem}-{stems[:i].count(stem) + 1}"
        for i, stem in enumerate(stems)
    ]
