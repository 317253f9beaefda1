"""The `hyperlora` program: one sub-command per module of this package.

Exit codes: 0 done, 2 wrong use or bad input (one line on stderr), 75 preempted after saving,
130 interrupted, 141 who reads stopped, 1 anything else (with a traceback: that is a bug).
"""

import contextlib
import difflib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

from hyperlora_jax.cli.process import PREEMPTED, Process, said
from hyperlora_jax.errors import Interrupted, Preempted, TrainingDiverged, UserError

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
    "export": ("export", "what was trained as files; a base as a graph that takes LoRAs"),
    "push": ("push", "what was exported or generated -> a repository of the hub"),
    "inspect": ("inspect", "what a LoRA, dataset, checkpoint or workdir holds"),
    "evaluate": ("evaluate", "scores on held-out identities, figures, report"),
    "serve": ("serve", "a local page: pictures in, LoRA and pictures out"),
    "compile": ("compile", "does the training step fit this TPU pod? needs no TPU"),
}
TRAINING = ("train", "pretrain", "demo")  # save at SIGTERM
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `hyperlora … | head`: who reads has enough
        for stream in (sys.stdout, sys.stderr):  # Python writes what is left of them at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + signal.SIGPIPE


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from hyperlora_jax import __version__

        print(__version__)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(
            f"hyperlora: unknown command {name!r}, expected {', '.join(COMMANDS)}{hint}",
            file=sys.stderr,
        )
        return 2
    with Process(saves=name in TRAINING) as process:
        code, line = _outcome(name, arguments[1:], process.start)
    return process.end(code, line)


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Runs one command in this process alone; returns its exit code."""
    code, line = _outcome(name, arguments, lambda needs_jax: False)
    return said(code, line)


def _outcome(name: str, arguments: Sequence[str], start: Callable[[bool], bool]) -> tuple[int, str]:
    """Parses the arguments of one command and runs it: (exit code, what to say on stderr).

    Args:
        start: called once they are known to be right, with whether the command needs JAX; returns
            whether to be quiet.
    """
    from hyperlora_jax.cli import buckets, config_text
    from hyperlora_jax.cli.arguments import parse

    module_name, summary = COMMANDS[name]
    module = importlib.import_module(f"hyperlora_jax.cli.{module_name}")
    try:
        args = parse(name, summary, module, arguments)
        if getattr(args, "print_config", False):
            print(config_text.of_command(args))
            return 0, ""
        quiet = start(not hasattr(module, "needs_jax") or module.needs_jax(args))
        # What a run wrote is said by one process; errors, on stderr, are everybody's.
        with (
            contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout),
            buckets.local_arguments(name, args),
        ):
            return module.run(args), ""
    except SystemExit as stop:  # --help
        return int(stop.code or 0), ""
    except UserError as error:
        return 2, f"hyperlora {name}: {error}"
    except Preempted as error:
        return PREEMPTED, f"hyperlora {name}: {error}"
    except TrainingDiverged as error:
        return 1, f"hyperlora {name}: {error}"
    except Interrupted as error:
        return INTERRUPTED, f"hyperlora {name}: {error}"
    except KeyboardInterrupt:
        return INTERRUPTED, f"hyperlora {name}: interrupted"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: hyperlora COMMAND [options]", "", *lines, "", "hyperlora COMMAND --help"]
    )


if __name__ == "__main__":
    sys.exit(main())
