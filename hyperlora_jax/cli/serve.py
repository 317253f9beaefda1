"""`hyperlora serve`: a local page, picture in, LoRA and pictures out."""

import argparse
import os
import signal
import threading
from pathlib import Path

from hyperlora_jax.errors import UserError

DIRECTIONS = "directions.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, base, address."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?",
        help="workdir of `train` or `demo`; default: the small one inside the package",
    )  # fmt: skip
    parser.add_argument("--base", metavar="BASE", help="default: what the checkpoint names")
    parser.add_argument("--encoder", metavar="PATH", help="condition encoder, where it was moved")
    parser.add_argument(
        "--directions", metavar="FILE", help="of `hyperlora directions`, for edits; default: "
        f"CHECKPOINT/{DIRECTIONS}, if it is there",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--num_steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--guidance", type=float, help="default: the base's own")


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted."""
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port is {args.port}, expected 1 to 65535")
    if not 1 <= args.num_steps <= 1000:
        raise UserError(f"--num_steps is {args.num_steps}, expected 1 to 1000")
    from hyperlora_jax.hypernet.editing import load_directions
    from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
    from hyperlora_jax.parallel.mesh import make_mesh
    from hyperlora_jax.serve.page import Served
    from hyperlora_jax.serve.studio import Studio
    from hyperlora_jax.shipped import HYPERNETWORK, checkpoint_path
    from hyperlora_jax.stable_diffusion.embedded import load_base

    checkpoint = str(args.checkpoint or checkpoint_path(HYPERNETWORK))
    hyper = Hypernetwork.restore(checkpoint, args.encoder)
    base = args.base or str(hyper.facts.get("base", ""))
    if not base:
        raise UserError(f"checkpoint {checkpoint}: names no base, expected --base BASE")
    beside = Path(checkpoint) / DIRECTIONS
    file = args.directions or (beside if beside.is_file() else None)
    directions = load_directions(file, hyper.spec) if file else None
    sd = load_base(base, mesh=make_mesh())  # all devices draw
    studio = Studio(hyper, sd, directions, guidance=args.guidance, num_steps=args.num_steps)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    served = Served(studio, base, args.host, args.port)
    try:
        print("compiling; the first time takes a minute …", flush=True)
        studio.warm_up()
        print(f"open {served.url}   (Ctrl-C ends)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nended", flush=True)
    finally:
        served.close()
    # A thread that still compiles cannot be stopped, and Python's own end aborts under it.
    os._exit(0)
