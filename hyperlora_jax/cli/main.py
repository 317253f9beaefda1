"""The `hyperlora` program: one sub-command per module of this package.

Exit codes: 0 done, 2 wrong use or bad input (one line on stderr), 75 preempted after saving,
130 interrupted, 1 anything else (with a traceback: that is a bug).
"""

import argparse
import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hyperlora_jax.errors import UserError

COMMANDS = {
    "demo": ("demo", "the whole pipeline on the embedded tiny base and avatars"),
    "pretrain": ("pretrain", "train or fine-tune the Stable Diffusion base itself"),
    "distill": ("distill", "images per concept -> LoRA-target dataset"),
    "import": ("import_loras", "LoRA files -> LoRA-target dataset"),
    "train": ("train", "LoRA-target dataset and images -> hypernetwork checkpoint"),
    "generate": ("generate", "checkpoint + reference images -> LoRA files"),
    "directions": ("directions", "attribute directions of a LoRA-target dataset"),
    "refine": ("refine", "a few steps on top of a generated LoRA"),
    "sample": ("sample", "images from a base model and LoRAs"),
    "convert": ("convert", "one LoRA file format into another"),
    "merge": ("merge", "weighted sums of LoRA files, at any rank, or into a base"),
    "extract": ("extract", "the difference of two models as a LoRA"),
    "export": ("export", "pretrained UNet -> diffusers directory, hypernetwork -> safetensors"),
    "inspect": ("inspect", "what a LoRA, dataset, checkpoint or workdir holds"),
    "evaluate": ("evaluate", "scores on held-out identities, figures, report"),
    "compile": ("compile", "does the training step fit this TPU pod? needs no TPU"),
}
PREEMPTED = 75


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from hyperlora_jax import __version__

        print(__version__)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(
            f"hyperlora: unknown command {name!r}, expected {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    devices = ("accel*", "vfio/[0-9]*", "nvidia*")
    if sys.platform == "linux" and not any(any(Path("/dev").glob(d)) for d in devices):
        # libtpu without a TPU (it is installed for `hyperlora compile`) would look for one at
        # length and complain.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from hyperlora_jax.parallel import compilation_cache, cpu_devices, multihost

    cpu_devices.prepare()
    several = multihost.start()
    compilation_cache.enable()
    # What a run wrote is said by one process; errors, on stderr, are everybody's.
    quiet = several and jax.process_index() > 0
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout):
        return run_command(name, arguments[1:])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Parses the arguments of one command and runs it, errors turned into exit codes."""
    module_name, summary = COMMANDS[name]
    module = importlib.import_module(f"hyperlora_jax.cli.{module_name}")
    parser = argparse.ArgumentParser(prog=f"hyperlora {name}", description=summary)
    module.add_arguments(parser)
    takes_config = any(action.dest == "config" for action in parser._actions)
    try:
        known, rest = parser.parse_known_args(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    if takes_config:
        known.overrides = [item for item in rest if item.startswith("--config.")]
        rest = [item for item in rest if not item.startswith("--config.")]
    if rest:
        print(f"hyperlora {name}: unknown argument {rest[0]!r}", file=sys.stderr)
        return 2
    from hyperlora_jax.train.loop import TrainingDiverged
    from hyperlora_jax.train.preemption import Preempted

    try:
        return module.run(known)
    except UserError as error:
        print(f"hyperlora {name}: {error}", file=sys.stderr)
        return 2
    except Preempted as error:
        print(f"hyperlora {name}: {error}", file=sys.stderr)
        return PREEMPTED
    except TrainingDiverged as error:
        print(f"hyperlora {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"hyperlora {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: hyperlora COMMAND [options]", "", *lines, "", "hyperlora COMMAND --help"]
    )


if __name__ == "__main__":
    sys.exit(main())
