"""Benchmarks: one name, one table, one JSON file.

    python tools/bench.py unet --json docs/measurements/unet_cpu.json
    python tools/bench.py unet --device gpu --json docs/measurements/unet_gpu.json
    python tools/bench.py data --against ../older_checkout
    python tools/bench.py all

Every benchmark runs ours and a peer in turns on the same machine and reports medians. A row is
{"workload", "ours", "peer", "unit", "ratio", "runs", "machine"}; ratio > 1: ours is better,
and peer and ratio are null where there is nothing to compare with.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys

from rich.console import Console
from rich.table import Table

TOOLS = pathlib.Path(__file__).resolve().parent
BENCHMARKS = {
    "unet": "bench_unet",
    "export": "bench_export",
    "data": "bench_data",
    "distill": "bench_distill",
    "hypernet": "bench_hypernet",
    "restart": "bench_restart",
    "serve": "bench_serve",
    "sample": "bench_sample",
    "shell": "bench_shell",
    "load": "bench_load",
    "demo": "bench_demo",
}
COMPARING = ("data", "restart", "shell", "demo")  # two builds of this project
COLUMNS = ("workload", "ours", "peer", "unit", "ratio", "runs")


def main(arguments: list[str] | None = None) -> int:
    """Parses, runs, prints the table, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--device", choices=("cpu", "gpu", "v5e"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--against", type=pathlib.Path, metavar="CHECKOUT",
        help=f"another build as the peer of {', '.join(COMPARING)}",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    if given.against and given.name not in COMPARING:
        parser.error(f"--against goes with {', '.join(COMPARING)}, not with {given.name}")
    sys.path.insert(0, str(TOOLS))
    if given.device == "cpu":  # JAX has one device per core only where the platform is named
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    names = list(BENCHMARKS) if given.name == "all" else [given.name]
    rows = []
    for name in names:
        options = {"against": given.against.resolve()} if given.against else {}
        rows += importlib.import_module(BENCHMARKS[name]).run(given.device, **options)
    Console().print(table(rows))
    if given.json:
        path = pathlib.Path(given.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"wrote {path}")
    return 0


def table(rows: list[dict]) -> Table:
    """The rows as people read them."""
    shown = Table(title=rows[0]["machine"] if rows else "")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in ("workload", "unit") else "right")
    for row in rows:
        shown.add_row(*(_cell(row[column]) for column in COLUMNS))
    return shown


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "–" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
