"""The table of compiled steps in docs/scaling.md, from docs/measurements/pods_CONFIG.json.

A record is what `hyperlora compile --config configs/CONFIG.py --json FILE` writes, one per slice.
Whatever stands between the marker lines `<!-- pods -->` and `<!-- /pods -->` is replaced.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from hyperlora_jax.errors import UserError

MARKED = re.compile(r"(<!-- pods -->\n)(.*?)(<!-- /pods -->)", re.DOTALL)
HEADING = (
    "config", "slice", "chips", "data × fsdp", "batch per chip", "remat", "peak memory, GiB",
    "TFLOP per chip", "all-reduce, MiB", "other traffic, MiB", "step, estimate", "compiled",
)  # fmt: skip
KEYS = ("topology", "chips", "fits", "mesh", "batch_per_chip", "remat", "effort")


def read_pods(root: epath.PathLike) -> dict[str, list[Mapping[str, Any]]]:
    """Records by config, in the order of their names.

    Raises:
      UserError: a file that holds no such records.
    """
    folder = epath.Path(root) / "docs" / "measurements"
    found = {}
    for file in sorted(folder.glob("pods_*.json"), key=lambda file: file.name):
        try:
            records = json.loads(file.read_text())
            missing = [key for record in records for key in KEYS if key not in record]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file}: cannot be read as records ({error})") from error
        if missing:
            raise UserError(f"{file}: found no {missing[0]}, expected records of hyperlora compile")
        found[file.stem.removeprefix("pods_")] = records
    return found


def fill(text: str, pods: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """The page with its marked part replaced by the table."""
    lines = ["| " + " | ".join(HEADING) + " |", "|---" * 2 + "|---:" * (len(HEADING) - 2) + "|"]
    for config, records in pods.items():
        lines += ["| " + " | ".join(row(config, record)) + " |" for record in records]
    table = "\n".join(lines) if pods else "Nothing has been recorded yet."
    return MARKED.sub(lambda match: f"{match[1]}{table}\n{match[3]}", text)


def row(config: str, record: Mapping[str, Any]) -> list[str]:
    """The cells of one record."""
    mesh = record["mesh"]
    start = [
        f"`{config}`",
        record["topology"],
        str(record["chips"]),
        f"{mesh['data']} × {mesh['fsdp']}",
        str(record["batch_per_chip"]),
        record["remat"],
    ]
    took = f"{record['compile_seconds']:.0f} s, {record['effort']} effort"
    if "bytes" not in record:
        return [*start, "does not fit", "", "", "", "", took]
    size = {name: value / 2**30 for name, value in record["bytes"].items()}
    reduced, rest = 0.0, 0.0
    for operation, axes in record["collective_bytes"].items():
        total = sum(axes.values()) / 2**20
        if operation == "all-reduce":
            reduced += total
        else:
            rest += total
    fits = "" if record["fits"] else "does not fit: "
    return [
        *start,
        f"{fits}{size['peak']:.1f} of {size['limit']:.1f}",
        f"{record['flops_per_chip'] / 1e12:.1f}",
        f"{reduced:,.0f}",
        f"{rest:,.0f}",
        f"{record['step_seconds_estimate'] * 1e3:,.0f} ms",
        took,
    ]
