"""`hyperlora inspect WORKDIR`: how far a run is, how fast it goes, and where its time went."""

import argparse
import json

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The workdir."""
    parser.add_argument("workdir", metavar="WORKDIR", help="the --workdir of a run")
    parser.add_argument("--json", metavar="FILE", help="write the same as JSON")


def is_workdir(path: epath.PathLike) -> bool:
    """Whether `path` is the workdir of a training run."""
    root = epath.Path(path)
    return (root / "checkpoints").is_dir() or (root / "metrics.jsonl").exists()


def summary(path: epath.PathLike) -> Json:
    """The state of a run, JSON-able.

    Raises:
      UserError: `path` is no workdir.
    """
    from hyperlora_jax.train.checkpoints import best_step, complete_steps, read_meta
    from hyperlora_jax.train.events import goodput
    from hyperlora_jax.train.json_lines import read_rows

    root = epath.Path(path)
    if not is_workdir(root):
        raise UserError(
            f"{path}: no checkpoints and no metrics.jsonl, expected the workdir of a run"
        )
    steps = complete_steps(root / "checkpoints")
    rows = read_rows(root / "metrics.jsonl")
    events = read_rows(root / "events.jsonl")
    meta = read_meta(root / "checkpoints", steps[-1]) if steps else {}
    if not meta and (root / "config.json").exists():
        meta = json.loads((root / "config.json").read_text())
    return {
        "workdir": str(path),
        "checkpoints": steps,
        "best_checkpoint": best_step(root / "checkpoints"),
        "last_row": rows[-1] if rows else None,
        "lowest_loss": min((row for row in rows if row["loss"] is not None), default=None,
                           key=lambda row: row["loss"]),
        "starts": len({row["run"] for row in events}),
        "last_event": events[-1]["event"] if events else None,
        "goodput": goodput(root / "events.jsonl"),
        "facts": meta.get("facts", {}),
    }  # fmt: skip


def as_text(facts: Json) -> str:
    """A summary as a few lines."""
    from hyperlora_jax.train.events import as_text as buckets_text

    lines = [
        f"{facts['workdir']}: {facts['starts']} start(s), last event {facts['last_event']}",
        f"  checkpoints at steps {facts['checkpoints'] or 'none'}",
    ]
    if facts["best_checkpoint"] is not None:
        lines[-1] += f", lowest mean loss at {facts['best_checkpoint']}"
    if facts["last_row"]:
        shown = {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in facts["last_row"].items()
        }
        lines.append("  last row: " + ", ".join(f"{name} {v}" for name, v in shown.items()))
    if facts["lowest_loss"]:
        lowest = facts["lowest_loss"]
        lines.append(f"  lowest logged loss {lowest['loss']:.6g} at step {lowest['step']}")
    if facts["goodput"]:
        lines.append("  " + buckets_text(facts["goodput"]))
    for name, value in facts["facts"].items():
        text = json.dumps(value)
        lines.append(f"  {name}: {text if len(text) <= 80 else text[:77] + '...'}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Prints the summary."""
    facts = summary(args.workdir)
    print(as_text(facts))
    if args.json:
        try:
            text = json.dumps(facts, indent=1) + "\n"
            storage.replaced(storage.place(args.json), text.encode())
        except OSError as error:
            raise UserError(f"--json {args.json}: {error.strerror}") from error
    return 0
