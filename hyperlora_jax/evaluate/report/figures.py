"""Pictures for the report: comparison grids and the worst cases.

Drawn with Pillow in plain pixels: nearest neighbour, so that nothing is smoothed over. Rows are
the first identities of the test set in its own order: nobody picked them.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hyperlora_jax.array_types import AnyArray, Float
from hyperlora_jax.evaluate.compare import MethodResult
from hyperlora_jax.evaluate.methods import title
from hyperlora_jax.evaluate.picture_sets import AnySet
from hyperlora_jax.evaluate.protocol import EvaluationSet, unit_pixels

if TYPE_CHECKING:
    from PIL import Image

GRID_COLUMNS = ("generated", "conventional", "base", "shuffled")
CELL = 128  # pixels of a cell's side on the page
GAP = 6
TITLE = 56  # pixels for a column's title, in two lines
CAPTION = 30  # pixels for a row's caption
LARGEST = 24  # font size; a phone shows the page at less than half its size
INK, PAPER, FAINT = (32, 34, 40), (255, 255, 255), (110, 114, 124)


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """One bad picture.

    Attributes:
      identity, caption: where it stands in the test set.
      loss: mean squared error to the exact render, or distance to the subject's other pictures.
      recognised: its identity score.
      mistaken_for: row of the candidate that it is nearest to.
    """

    identity: int
    caption: int
    loss: float
    recognised: float
    mistaken_for: int


def draw_grid(
    columns: Mapping[str, Sequence[AnyArray]], captions: Sequence[str] = (), cell: int = CELL
) -> "Image.Image":
    """Pictures [h, w, 3] in [0, 1] as a table: one column per entry, one row per index.

    Args:
      columns: {title: pictures}, all of one length.
      captions: one line of text under every row; none when empty.
      cell: side of a cell in pixels.
    """
    from PIL import Image, ImageDraw

    rows = len(next(iter(columns.values())))
    below = CAPTION if captions else 0
    width = GAP + len(columns) * (cell + GAP)
    height = TITLE + rows * (cell + below + GAP)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    titles = [name.replace(" ", "\n", 1) for name in columns]
    font = _fitting_font(draw, [line for name in titles for line in name.split("\n")], cell)
    for k, (name, pictures) in enumerate(zip(titles, columns.values(), strict=True)):
        left = GAP + k * (cell + GAP)
        place = (left + cell / 2, TITLE / 2)
        draw.multiline_text(place, name, INK, font, anchor="mm", align="center", spacing=2)
        for row, picture in enumerate(pictures):
            top = TITLE + row * (cell + below + GAP)
            page.paste(_enlarged(picture, cell), (left, top))
    font = _fitting_font(draw, captions, width - 2 * GAP)
    for row, text in enumerate(captions):
        top = TITLE + row * (cell + below + GAP) + cell + below / 2
        draw.text((GAP, top), text, FAINT, font, anchor="lm")
    return page


def main_grid(
    test: AnySet,
    results: Mapping[str, MethodResult],
    num_rows: int = 6,
    methods: Sequence[str] = GRID_COLUMNS,
) -> "Image.Image":
    """reference | exact | generated | conventional | base | shuffled, for the first identities.

    Row k shows identity k under its caption number k (modulo the captions), so that captions vary.
    Methods that were not run are left out; without exact pictures another one of the subject is
    shown.
    """
    shown = [name for name in methods if name in results]
    rows = min(num_rows, test.num_identities, *(len(results[name].images) for name in shown))
    where = [(k, k % test.num_captions) for k in range(rows)]
    right, answers = _answers(test)
    columns = {
        title("reference"): [test.references[i] for i, _ in where],
        right: [answers[i, c] for i, c in where],
    }
    for name in shown:
        columns[title(name)] = [results[name].images[i, c] for i, c in where]
    return draw_grid(columns, [test.captions[i][c] for i, c in where])


def worst_cases(test: AnySet, result: MethodResult, count: int = 10) -> list[WorstCase]:
    """The `count` worst pictures: unrecognised ones first, then by loss; one per identity."""
    top1, loss, taken_for = result.scores.top1, result.scores.loss, result.scores.taken_for
    order = sorted(np.ndindex(*top1.shape), key=lambda at: (top1[at], -loss[at]))
    worst: dict[int, WorstCase] = {}
    for i, c in order:
        if i not in worst and len(worst) < count:
            case = WorstCase(i, c, float(loss[i, c]), float(top1[i, c]), int(taken_for[i, c]))
            worst[i] = case
    return list(worst.values())


def worst_grid(test: AnySet, result: MethodResult, cases: Sequence[WorstCase]) -> "Image.Image":
    """reference | exact | generated | who the judge took it for, one row per case."""
    references, (right, answers) = test.references, _answers(test)
    columns = {
        title("reference"): [references[w.identity] for w in cases],
        right: [answers[w.identity, w.caption] for w in cases],
        "generated": [result.images[w.identity, w.caption] for w in cases],
        "taken for": [_candidate(test, w) for w in cases],
    }
    word = "error" if isinstance(test, EvaluationSet) else "distance"
    notes = [
        f"{word} {w.loss:.4f}, {'recognised' if w.recognised else 'not recognised'}" for w in cases
    ]
    return draw_grid(columns, notes)


def _answers(test: AnySet) -> tuple[str, Float[np.ndarray, "i c h w 3"]]:
    if isinstance(test, EvaluationSet):
        return title("exact"), test.exact
    return "another picture", test.others


def _candidate(test: AnySet, case: WorstCase) -> Float[np.ndarray, "h w 3"]:
    if isinstance(test, EvaluationSet):
        return unit_pixels(
            test.pool[case.mistaken_for, test.caption_index[case.identity, case.caption]]
        )
    return unit_pixels(test.gallery[case.mistaken_for][0])


def to_png(image: "Image.Image") -> bytes:
    """A picture as PNG bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _enlarged(picture: Float[AnyArray, "h w 3"], side: int) -> "Image.Image":
    from PIL import Image

    pixels = np.clip(np.nan_to_num(np.asarray(picture, np.float32)), 0.0, 1.0)
    image = Image.fromarray((pixels * 255.0 + 0.5).astype(np.uint8))
    return image.resize((side, side), Image.Resampling.NEAREST)


def _fitting_font(draw, lines: Sequence[str], width: int):
    """The largest font in which every line fits."""
    from PIL import ImageFont

    for size in range(LARGEST, 8, -1):
        font = ImageFont.load_default(size)
        if all(draw.textlength(line, font) <= width for line in lines):
            return font
    return ImageFont.load_default(8)
