"""Writes docs/results.md and the README's results from docs/measurements/result_*.json.

    python tools/make_results.py                     write what is out of date
    python tools/make_results.py --check             say what is out of date; exit 1 if anything is
    python tools/make_results.py --name demo --title "The demo" --command "make demo" \
        --machine "2 cores" --metrics demo/metrics.json --grid demo/grid.png
                                                     record a run first
"""

import argparse
import pathlib
import sys

import results_page

from hyperlora_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = ("name", "title", "command", "machine", "metrics", "grid")


def main(arguments: list[str] | None = None) -> int:
    """Parses and calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--root", default=str(ROOT), help="the repository")
    for name in RECORD:
        parser.add_argument(f"--{name}")
    given = parser.parse_args(arguments)
    values = {name: getattr(given, name) for name in RECORD}
    try:
        if any(values.values()):
            missing = [f"--{name}" for name, value in values.items() if not value]
            if missing:
                raise UserError(f"{', '.join(missing)}: missing, all six record a run")
            metrics, grid = values.pop("metrics"), values.pop("grid")
            print(results_page.add_record(given.root, metrics, grid, **values))
        if given.check:
            stale = results_page.stale_pages(given.root)
            for page in stale:
                print(f"{page} is out of date, run python tools/make_results.py", file=sys.stderr)
            return 1 if stale else 0
        for page in results_page.write_pages(given.root):
            print(page)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
