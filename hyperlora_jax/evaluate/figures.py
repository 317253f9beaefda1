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
from hyperlora_jax.evaluate.method_names import TITLES
from hyperlora_jax.evaluate.protocol import EvaluationSet

if TYPE_CHECKING:
    from PIL import Image

GRID_COLUMNS = ("generated", "conventional", "base", "shuffled")
CELL = 128  # pixels of a cell's side on the page
GAP = 6
TITLE = 30  # pixels for a column's title
CAPTION = 22  # pixels for a row's caption
INK, PAPER, FAINT = (32, 34, 40), (255, 255, 255), (110, 114, 124)


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """One bad picture.

    Attributes:
      identity, caption: where it stands in the test set.
      error: mean squared error to the exact render.
      recognised: its identity score.
      mistaken_for: row of the pool whose exact render is nearest.
    """

    identity: int
    caption: int
    error: float
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
    from PIL import Image, ImageDraw, ImageFont

    rows = len(next(iter(columns.values())))
    below = CAPTION if captions else 0
    width = GAP + len(columns) * (cell + GAP)
    height = TITLE + rows * (cell + below + GAP)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    font = _fitting_font(draw, max(columns, key=len), cell)
    for k, (title, pictures) in enumerate(columns.items()):
        left = GAP + k * (cell + GAP)
        draw.text((left + cell / 2, TITLE / 2), title, INK, font, anchor="mm")
        for row, picture in enumerate(pictures):
            top = TITLE + row * (cell + below + GAP)
            page.paste(_enlarged(picture, cell), (left, top))
    for row, text in enumerate(captions):
        top = TITLE + row * (cell + below + GAP) + cell + below / 2
        draw.text((GAP, top), text, FAINT, ImageFont.load_default(14), anchor="lm")
    return page


def main_grid(
    test: EvaluationSet,
    results: Mapping[str, MethodResult],
    num_rows: int = 6,
    methods: Sequence[str] = GRID_COLUMNS,
) -> "Image.Image":
    """reference | exact | generated | conventional | base | shuffled, for the first identities.

    Row k shows identity k under its caption number k (modulo the captions), so that captions vary.
    Methods that were not run are left out.
    """
    shown = [name for name in methods if name in results]
    rows = min(num_rows, *(len(results[name].images) for name in shown), test.num_identities)
    where = [(k, k % test.num_captions) for k in range(rows)]
    exact = test.exact
    columns = {
        TITLES["reference"]: [test.references[i] for i, _ in where],
        TITLES["exact"]: [exact[i, c] for i, c in where],
    }
    for name in shown:
        columns[TITLES.get(name, name)] = [results[name].images[i, c] for i, c in where]
    return draw_grid(columns, [test.captions[i][c] for i, c in where])


def worst_cases(test: EvaluationSet, result: MethodResult, count: int = 10) -> list[WorstCase]:
    """The `count` worst pictures: unrecognised ones first, then by error; one per identity."""
    top1, error = result.scores.top1, result.scores.error
    order = sorted(np.ndindex(*top1.shape), key=lambda at: (top1[at], -error[at]))
    found, seen = [], set()
    for i, c in order:
        if i in seen or len(found) == count:
            continue
        seen.add(i)
        picture = np.clip(np.nan_to_num(result.images[i, c]), 0.0, 1.0)
        distance = np.square(test.candidate_renders(i)[c] - picture).mean(axis=(1, 2, 3))
        nearest = int(test.candidates[i, int(distance.argmin())])
        found.append(WorstCase(i, c, float(error[i, c]), float(top1[i, c]), nearest))
    return found


def worst_grid(
    test: EvaluationSet, result: MethodResult, cases: Sequence[WorstCase]
) -> "Image.Image":
    """reference | exact | generated | who the judge took it for, one row per case."""
    exact, references = test.exact, test.references
    pool = [test.pool[w.mistaken_for, test.caption_index[w.identity, w.caption]] for w in cases]
    columns = {
        "reference": [references[w.identity] for w in cases],
        "exact answer": [exact[w.identity, w.caption] for w in cases],
        "generated": [result.images[w.identity, w.caption] for w in cases],
        "taken for": [picture / np.float32(255) for picture in pool],
    }
    notes = [
        f"error {w.error:.4f}, {'recognised' if w.recognised else 'not recognised'}" for w in cases
    ]
    return draw_grid(columns, notes)


def to_png(image: "Image.Image") -> bytes:
    """A picture as PNG bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _enlarged(picture: Float[AnyArray, "h w 3"], side: int) -> "Image.Image":
    from PIL import Image

    pixels = np.clip(np.nan_to_num(np.asarray(picture, np.float32)), 0.0, 1.0)
    image = Image.fromarray(np.uint8(pixels * 255.0 + 0.5))
    return image.resize((side, side), Image.Resampling.NEAREST)


def _fitting_font(draw, text: str, width: int):
    from PIL import ImageFont

    for size in range(17, 8, -1):
        font = ImageFont.load_default(size)
        if draw.textlength(text, font) <= width:
            return font
    return ImageFont.load_default(8)
