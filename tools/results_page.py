"""Writes docs/results.md and the README's results from measured records, so they cannot drift.

Experiments (`experiments_page.py`) follow after the records, and then the tables of
docs/measurements/drawing_NAME.json (`tools/drawing.py`); `pods_page.py` fills the table of
docs/scaling.md.

A record is docs/measurements/result_NAME.json: {"name", "title", "command", "machine", "picture",
"metrics"}, with `metrics` the metrics.json of a run and `picture` relative to docs/. In the README,
whatever stands between the two marker lines of a name is replaced:

    <!-- results: NAME -->
    <!-- /results -->

`make_results.py` calls `add_record`, `write_pages` and `stale_pages`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import experiments_page
import pods_page
from etils import epath

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.methods import title
from hyperlora_jax.evaluate.report import verdicts, wording

KEYS = ("name", "title", "command", "machine", "picture", "metrics")
MARKED = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
README_METHODS = ("exact", "conventional", "generated", "nearest", "mean_lora", "shuffled", "base")


def add_record(
    root: epath.PathLike,
    metrics_file: epath.PathLike,
    grid_file: epath.PathLike,
    *,
    name: str,
    title: str,
    command: str,
    machine: str,
) -> epath.Path:
    """Copies a run's metrics.json and grid.png into docs/ as the record `name`.

    Raises:
      UserError: a name with other than letters, digits, _ and -, or files that cannot be read.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"--name: found {name!r}, expected letters, digits, _ and -")
    docs = epath.Path(root) / "docs"
    metrics = _read_json(epath.Path(metrics_file))
    for key in ("identity_top1", "image_error", "evaluation", "strength"):
        if key not in metrics:
            raise UserError(f"{metrics_file}: found no {key!r}, expected a metrics.json")
    grid = epath.Path(grid_file)
    if not grid.exists():
        raise UserError(f"{grid_file}: no such file, expected the run's grid.png")
    (docs / "pictures").mkdir(parents=True, exist_ok=True)
    (docs / "measurements").mkdir(parents=True, exist_ok=True)
    picture = f"pictures/{name}.png"
    (docs / picture).write_bytes(grid.read_bytes())
    values = (name, title, command, machine, picture, metrics)
    file = docs / "measurements" / f"result_{name}.json"
    record = dict(zip(KEYS, values, strict=True))
    file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return file


def read_records(root: epath.PathLike) -> dict[str, Mapping[str, Any]]:
    """All records by name, in the order of their names.

    Raises:
      UserError: a file that is no such record.
    """
    found = {}
    folder = epath.Path(root) / "docs" / "measurements"
    files = folder.glob("result_*.json") if folder.exists() else []
    for file in sorted(files, key=lambda file: file.name):
        record = _read_json(file)
        missing = [key for key in KEYS if key not in record]
        if missing:
            raise UserError(f"{file}: found no {', '.join(missing)}, expected {', '.join(KEYS)}")
        found[record["name"]] = record
    return found


def expected_pages(root: epath.PathLike) -> dict[epath.Path, str]:
    """What docs/results.md, docs/scaling.md and README.md should say, given the records."""
    records = read_records(root)
    readme = epath.Path(root) / "README.md"
    experiments = experiments_page.read_experiments(root)
    folder = epath.Path(root) / "docs" / "measurements"
    files = sorted(folder.glob("drawing_*.json"), key=str) if folder.exists() else []
    drawings = [_read_json(file) for file in files]
    page = results_page(list(records.values()), experiments, drawings)
    pages = {epath.Path(root) / "docs" / "results.md": page}
    if readme.exists():
        pages[readme] = fill_readme(readme.read_text(), records)
    scaling = epath.Path(root) / "docs" / "scaling.md"
    if scaling.exists():
        pages[scaling] = pods_page.fill(scaling.read_text(), pods_page.read_pods(root))
    return pages


def write_pages(root: epath.PathLike) -> list[epath.Path]:
    """Writes the pages that are not as expected; returns them."""
    written = stale_pages(root)
    for page in written:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(expected_pages(root)[page])
    return written


def stale_pages(root: epath.PathLike) -> list[epath.Path]:
    """Pages that differ from what the records say."""
    return [
        page
        for page, text in expected_pages(root).items()
        if not page.exists() or page.read_text() != text
    ]


def fill_readme(text: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with every marked part replaced by its record's picture, table and sentences.

    Raises:
      UserError: a marker that names no record.
    """

    def block(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in records:
            raise UserError(
                f"README.md: results marker {name!r} has no docs/measurements/result_{name}.json, "
                f"found {', '.join(records) or 'none'}"
            )
        return f"{match.group(1)}{readme_block(records[name])}\n{match.group(4)}"

    return MARKED.sub(block, text)


def readme_block(record: Mapping[str, Any]) -> str:
    """Picture, short table and one paragraph."""
    metrics = record["metrics"]
    shown = [name for name in README_METHODS if name in metrics["identity_top1"]]
    scores = wording.score_table(metrics)
    rows = [row for row in _rows(scores) if row[0] in {title(name) for name in shown}]
    paragraph = " ".join(_sentences(metrics))
    return "\n\n".join(
        [
            f"![{record['title']}](docs/{record['picture']})",
            _markdown_table(["", *scores["columns"]], rows),
            f"{paragraph} Made by `{record['command']}` on {record['machine']}; "
            "everything else is in [docs/results.md](docs/results.md).",
        ]
    )


def results_page(
    records: Sequence[Mapping[str, Any]],
    experiments: Sequence[Mapping[str, Any]] = (),
    drawings: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole docs/results.md."""
    parts = [
        "# Results",
        "Written by `tools/make_results.py` from `measurements/result_*.json`, "
        "`measurements/experiment_*.json` and `measurements/drawing_*.json`; edit those, not this.",
    ]
    for record in records:
        parts += _section(record)
    for experiment in experiments:
        rows = _markdown_table(
            experiments_page.columns(experiment), experiments_page.table(experiment)
        )
        heading, command, note = experiments_page.section(experiment)
        parts += [heading, command, rows, note]
    for drawing in drawings:
        parts += [f"## {drawing['title']}", f"`{drawing['command']}`"]
        parts += [f"![{drawing['title']}]({picture})" for picture in drawing.get("pictures", ())]
        parts += [_markdown_table(drawing["columns"], drawing["rows"]), drawing["note"]]
    if not records:
        parts.append("Nothing has been recorded yet.")
    return "\n\n".join(parts) + "\n"


def _section(record: Mapping[str, Any]) -> list[str]:
    metrics = record["metrics"]
    scores, differences = wording.score_table(metrics), wording.difference_table(metrics)
    good = {"good": "+", "bad": "−"}
    parts = [
        f"## {record['title']}",
        f"`{record['command']}` on {record['machine']}.",
        f"![{record['title']}]({record['picture']})",
        _markdown_table(["", *scores["columns"]], _rows(scores)),
        scores["note"],
    ]
    if differences["rows"]:
        heading = ["generated minus …", *differences["columns"]]
        parts += [_markdown_table(heading, _rows(differences)), f"{differences['note']}."]
    judges = wording.judge_table(metrics)
    if judges["rows"]:
        heading = ["similarity to the reference", *judges["columns"]]
        parts += [_markdown_table(heading, _rows(judges)), judges["note"]]
    said = [f"- ({good[line['tone']]}) {line['text']}" for line in verdicts.verdicts(metrics)]
    times = [[row["name"], row["value"]] for row in wording.timings(metrics)]
    facts = [
        [row["name"], row["value"]]
        for row in wording.provenance(metrics)
        if row["name"] not in ("config", "pictures")
    ]
    parts.append("\n".join(said))
    if times:
        parts.append(_markdown_table(["stage", "time"], times))
    return [*parts, _markdown_table(["", "to run it again"], facts)]


def _sentences(metrics: Mapping[str, Any]) -> list[str]:
    wanted = ("Without a single training step", "PyTorch diffusers loads")
    texts = [line["text"] for line in verdicts.verdicts(metrics)]
    found = [text for text in texts if text.startswith(wanted)]
    speed = wording.speed_up(metrics)
    if speed:
        seconds = metrics["seconds"]
        found.append(
            f"A generated LoRA costs {wording.duration(seconds['generate_one_lora'])} "
            f"(in a batch), one fitted alone {wording.duration(seconds['fit_one_lora'])}: "
            f"{speed:,.0f}× less."
        )
    return found


def _rows(table: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["name"],
            *(f"{c['value']} ± {c['pm']}" if c["pm"] else c["value"] for c in row["cells"]),
        ]
        for row in table["rows"]
    ]


def _markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(f"| {' | '.join(str(c).replace('|', '/') for c in row)} |" for row in cells)


def _read_json(file: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: found {type(found).__name__}, expected a JSON object")
    return found
