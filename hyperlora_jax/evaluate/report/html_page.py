"""One self-contained HTML page from results: pictures inlined, readable on a phone, printable.

`write_report` also writes metrics.json and every picture as a PNG file beside the page. What the
page claims is computed here from the numbers (`verdicts`), never typed by hand.
"""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence

from etils import epath

from hyperlora_jax.array_types import Json
from hyperlora_jax.evaluate.compare import MethodResult
from hyperlora_jax.evaluate.picture_sets import AnySet
from hyperlora_jax.evaluate.protocol import EvaluationSet
from hyperlora_jax.evaluate.report import charts, figures, verdicts, wording
from hyperlora_jax.parallel import multihost

TEMPLATE = "report.html.j2"
PLACES = ("top", "body", "folded", "worst")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG on the page.

    Attributes:
      name: file name without suffix.
      png: the file's bytes.
      caption: one or two sentences under it.
      title: heading above it; none when empty.
      place: "top", "body", "folded" (behind a line that opens) or "worst".
    """

    name: str
    png: bytes
    caption: str
    title: str = ""
    place: str = "body"

    def __post_init__(self):
        """Raises ValueError for an unknown place."""
        if self.place not in PLACES:
            raise ValueError(f"expected a place in {PLACES}. Got: {self.place=}")


@dataclasses.dataclass(frozen=True)
class ReportFiles:
    """Where `write_report` put things."""

    page: epath.Path
    metrics: epath.Path
    figures: Mapping[str, epath.Path]


def write_report(
    folder: epath.PathLike,
    summary: Json,
    shown: Sequence[Figure],
    *,
    title: str,
    lead: str,
    done: Sequence[str],
    page_name: str = "report.html",
) -> ReportFiles:
    """Writes the page, metrics.json and the figures as NAME.png into `folder`; of several processes
    the first one does.

    Args:
      folder: made if missing.
      summary: of `summary.summarise`.
      shown: `standard_figures` and more.
      title, lead: heading and the sentence under it.
      done: paragraphs that say what was done.
      page_name: e.g. report.html or index.html.
    """
    target = epath.Path(folder)
    pictures = {figure.name: target / f"{figure.name}.png" for figure in shown}
    files = ReportFiles(target / page_name, target / "metrics.json", pictures)
    if not multihost.is_first():
        return files
    target.mkdir(parents=True, exist_ok=True)
    for figure in shown:
        pictures[figure.name].write_bytes(figure.png)
    files.metrics.write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    files.page.write_text(render_page(summary, shown, title=title, lead=lead, done=done))
    return files


def standard_figures(
    test: AnySet, results: Mapping[str, MethodResult], num_rows: int = 6
) -> list[Figure]:
    """The grid, the worst ten and the strength curves, as far as there are results for them."""
    exact = isinstance(test, EvaluationSet)
    shown = "picture but the reference" if exact else "drawn picture"
    every = [
        Figure(
            "grid",
            figures.to_png(figures.main_grid(test, results, num_rows)),
            "The first of the test, in its own order: nobody chose them. Under each row the words "
            f"that every {shown} should show.",
            place="top",
        )
    ]
    if "generated" in results:
        cases = figures.worst_cases(test, results["generated"])
        page = figures.worst_grid(test, results["generated"], cases)
        near = "exact render is nearest" if exact else "pictures the judge finds most similar"
        note = f"“Taken for” is the candidate whose {near} to the generated one."
        every.append(Figure("worst", figures.to_png(page), note, place="worst"))
    chart = charts.strength_chart(results)
    if chart is not None:
        note = "On validation identities, who are not among those scored above."
        every.append(Figure("strength", chart, note, "Strength, chosen per method"))
    return every


def render_page(
    summary: Json,
    shown: Sequence[Figure],
    *,
    title: str,
    lead: str,
    done: Sequence[str],
) -> str:
    """The HTML text; arguments as in `write_report`."""
    import jinja2

    folder = epath.resource_path("hyperlora_jax") / "assets"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((folder / TEMPLATE).read_text())
    return template.render(
        title=title,
        lead=lead,
        done=list(done),
        reading=wording.reading(summary),
        notes=list(summary["facts"].get("notes", ())),
        command=summary["facts"].get("command", ""),
        glossary=wording.glossary(summary),
        tiles=wording.tiles(summary),
        table=wording.score_table(summary),
        differences=wording.difference_table(summary),
        judges=wording.judge_table(summary),
        verdicts=verdicts.verdicts(summary),
        timings=wording.timings(summary),
        provenance=wording.provenance(summary),
        figures=[_inline(figure) for figure in shown],
    )


def _inline(figure: Figure) -> dict[str, object]:
    # The size stands in the PNG header: 8 bytes of signature, then IHDR's length and name.
    width, height = (int.from_bytes(figure.png[i : i + 4], "big") for i in (16, 20))
    return {
        "place": figure.place,
        "title": figure.title,
        "caption": figure.caption,
        "alt": figure.title or figure.name,
        "width": width,
        "height": height,
        "base64": base64.b64encode(figure.png).decode(),
    }
