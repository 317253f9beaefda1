"""`hyperlora directions`: attribute directions of a LoRA-target dataset, for `generate --edit`."""

import argparse
import json
from pathlib import Path

from hyperlora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Dataset, labels, output."""
    parser.add_argument("dataset", help="folder written by `hyperlora distill` or `import`")
    parser.add_argument(
        "--labels",
        metavar="JSON",
        required=True,
        help='{"attribute": ["ids of subjects that show it", …], …}; all others do not',
    )
    parser.add_argument("--out", metavar="FILE", required=True, help=".safetensors")


def run(args: argparse.Namespace) -> int:
    """Writes one direction per attribute."""
    import numpy as np

    from hyperlora_jax.hypernet.editing import fit_directions, save_directions
    from hyperlora_jax.targets.lora_targets import open_lora_targets

    targets = open_lora_targets(args.dataset)
    try:
        labels = json.loads(Path(args.labels).read_text())
        shown = {str(name): frozenset(map(str, ids)) for name, ids in labels.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"--labels {args.labels}: cannot be read ({error}), expected a JSON object of lists"
        ) from error
    present = set(targets.ids)
    for name, ids in shown.items():
        if unknown := sorted(ids - present):
            raise UserError(
                f"--labels {args.labels}: {name} lists {unknown[0]}, which {args.dataset} "
                f"does not hold ({len(unknown)} of {len(ids)})"
            )
    shows = {name: np.asarray([i in ids for i in targets.ids]) for name, ids in shown.items()}
    save_directions(args.out, fit_directions(targets.matrix(), targets.spec, shows))
    print(f"wrote {args.out} ({', '.join(shows)})")
    return 0
