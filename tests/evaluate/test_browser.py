"""The report in a real browser: every picture loads, nothing is wider than the screen."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.evaluate import compare
from hyperlora_jax.evaluate.audits.quality_curves import run_curve
from hyperlora_jax.evaluate.compare import Method
from hyperlora_jax.evaluate.methods import ORDER
from hyperlora_jax.evaluate.report import html_page, sections
from hyperlora_jax.evaluate.report.summary import summarise
from tests.evaluate import chromium

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (chromium.CHROMIUM and chromium.DRIVER), reason="no chromium and chromedriver"
    ),
]

MEASURE = """
const images = [...document.images];
const inside = e => e.closest('.scroll') && e !== e.closest('.scroll');
return {
  width: innerWidth,
  images: images.length,
  loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
  page: document.documentElement.scrollWidth,
  wide: [...document.querySelectorAll('body *')]
    .filter(e => !inside(e) && e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.tagName + ' ' + e.textContent.slice(0, 40)),
  small: [...document.querySelectorAll('p, li, td, th, figcaption, span')]
    .filter(e => parseFloat(getComputedStyle(e).fontSize) < 12)
    .map(e => e.textContent.slice(0, 40)),
};
"""


def lora(count, seed):
    random = np.random.default_rng(seed)

    def pair(width, out):
        down = random.standard_normal((count, width, 2)).astype(np.float32)
        return {"down": down, "up": random.standard_normal((count, 2, out)).astype(np.float32)}

    def block(level, number):
        kinds = {f"attn{k}": {f"to_{p}": pair(9, 7) for p in "qkv"} for k in (1, 2)}
        return {f"attentions_{number}": {"transformer_blocks_0": kinds}}

    blocks = ("down_blocks_0", "down_blocks_1", "mid_block", "up_blocks_0", "up_blocks_1")
    return {name: block(name, 0) for name in blocks}


def every_section(folder):
    """All sections that a run can have, on made-up numbers."""
    rows = [{"step": k, "loss": 0.4 / k**0.3} for k in range(1, 400)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def score(loras):
        return {"identity_top1": 1.0 - loras["x"]}

    def advance(loras, done, steps):
        return {"x": loras["x"] * 0.5 ** ((steps - done) / 20)}, 1.0

    starts = {"zero": 0.99, "mean": 0.95, "nearest": 0.7, "hypernetwork": 0.1}
    curves = {
        name: run_curve({"x": np.full(4, x)}, advance, score, (0, 5, 10, 25, 50, 100))
        for name, x in starts.items()
    }
    strips = np.random.default_rng(0).random((3, 5, 16, 16, 3))
    return [
        sections.memorisation_section(lora(8, 1), lora(40, 2)),
        sections.weight_section(lora(8, 1), lora(8, 3)),
        sections.learning_section(folder / "metrics.jsonl"),
        sections.interpolation_section(strips, (0.0, 0.25, 0.5, 0.75, 1.0)),
        sections.steps_section(curves, np.full(4, 0.95)),
    ]


@pytest.fixture(name="files", scope="module")
def _files(test_set, validation_set, probe, tmp_path_factory):
    """A page with everything on it: all methods, judges, sections."""
    folder = tmp_path_factory.mktemp("report")

    def noisy(level):
        def sample(questions, strength):
            noise = np.random.default_rng(0).standard_normal(questions.exact.shape)
            return questions.exact + np.float32((level + 0.2 * abs(strength - 1.5)) * noise)

        return sample

    strengths = (0.75, 1.0, 1.5, 2.0)
    methods = [
        Method(name, noisy(0.05 * k), strengths if k < 9 else (1.0,))
        for k, name in enumerate(ORDER)
        if name not in ("exact", "copy_reference")
    ]
    results = compare.compare(methods, validation_set, test_set, compare.scorer(probe))
    shown = every_section(folder)
    similarity = {name: {"mean": 0.5, "stderr": 0.01, "n": 6} for name in results}
    judged = {"hash": "h", "similarity": similarity}
    judges = {
        "own": {**judged, "is_condition_encoder": True},
        "independent": {**judged, "is_condition_encoder": False},
    }
    summary = summarise(
        results,
        test_set,
        validation_set,
        torch_parity={"max_abs_diff": 2e-7, "unexpected_keys": 0, "missing_keys": 0},
        seconds={"sampling": 83.0, "generate_one_lora": 0.002, "fit_one_lora": 3.4},
        facts={"base": "tiny-sd", "base_hash": "0" * 64, "config": {"a": "long " * 200}},
        further={"lpips": {name: result.scores.error for name, result in results.items()}},
        judges=judges,
    ) | {section.name: section.numbers for section in shown}
    more = [figure for section in shown for figure in section.figures]
    return html_page.write_report(
        folder,
        summary,
        [*html_page.standard_figures(test_set, results), *more],
        title="Zero-shot LoRAs, evaluated",
        lead="LoRAs for 6 identities that were never trained on.",
        done=["A paragraph about what was done, and with what."] * 3,
        page_name="index.html",
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_picture_is_seen(files, width, dark, tmp_path):
    with chromium.opened(files.page.as_uri(), width, tmp_path / "profile", dark) as page:
        found, picture = page.run(MEASURE), page.screenshot()
    assert found["width"] == width and found["images"] == len(files.figures) > 8
    assert found["loaded"] == found["images"]
    assert found["page"] <= width and found["wide"] == [] and found["small"] == []
    (tmp_path / "shot.png").write_bytes(picture)
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    assert pixels.shape[1] == width and pixels.shape[0] > 2000
    corner = pixels[:4, :4].mean()
    assert (corner < 60) if dark else (corner > 250)
    assert len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 100
