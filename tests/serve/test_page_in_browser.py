"""The page in a real browser: upload, sliders, download, error, on a phone and on a screen."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.shipped import shipped_path
from tests.evaluate import chromium
from tests.serve.serving import served

pytest.importorskip("gradio")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (chromium.CHROMIUM and chromium.DRIVER), reason="no chromium and chromedriver"
    ),
]
SHOWN = "document.querySelectorAll('.sides img').length"
MEASURE = """
return {
  page: document.documentElement.scrollWidth,
  wide: [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80)),
  pictures: [...document.querySelectorAll('.sides img')]
    .map(e => [e.naturalWidth, Math.round(e.getBoundingClientRect().width)]),
  foreign: performance.getEntriesByType('resource').map(e => e.name)
    .filter(name => !/^(data|blob):/.test(name) && !name.startsWith(location.origin)),
  background: getComputedStyle(document.body).backgroundColor,
};
"""
MOVE = """
const slider = document.querySelector('#strength input[type=range]');
slider.value = VALUE;
for (const kind of ['input', 'change', 'pointerup'])
  slider.dispatchEvent(new Event(kind, {bubbles: true}));
"""


@pytest.fixture(name="address", scope="module")
def _address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("serve")) as (_, address):
        yield address


def pictures(page):
    return page.run("return [...document.querySelectorAll('.sides img')].map(e => e.src)")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_visit(address, width, dark, tmp_path):
    (tmp_path / "bad.png").write_text("text")
    (tmp_path / "down").mkdir()
    person = sorted(shipped_path("example-people").glob("*.png"))[0]
    with chromium.opened(address, width, tmp_path / "profile", dark) as page:
        page.download_to(tmp_path / "down")
        page.until("document.querySelector('#pictures input[type=file]')")
        assert not page.run("return document.querySelector('#download-kohya')")
        page.choose_files("#pictures input[type=file]", [person])
        page.until(f"{SHOWN} == 9")
        first, measured, shot = pictures(page), page.run(MEASURE), page.screenshot()
        assert measured["page"] == width and measured["wide"] == measured["foreign"] == []
        assert all(natural == 192 and shown > 80 for natural, shown in measured["pictures"])
        page.run(MOVE.replace("VALUE", "0"))
        page.until(f"document.querySelectorAll('.sides img')[1].src != {first[1]!r}")
        weak = pictures(page)
        assert weak[1::3] == weak[2::3] == first[2::3]  # strength 0 is the base
        page.run("document.querySelector('#download-kohya').click()")
        page.until("true")
        end = time.monotonic() + 30
        while not (files := list((tmp_path / "down").glob("*.safetensors"))):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert load_lora(files[0])[1].max_rank == 4
        page.run("document.querySelector('#pictures button[aria-label=Clear]').click()")
        page.until(f"{SHOWN} == 0")
        page.choose_files("#pictures input[type=file]", [tmp_path / "bad.png"])
        page.until(
            "document.querySelector('#status').textContent.includes('bad.png: found 4 bytes')"
        )
        assert page.run(f"return {SHOWN}") == 0
    (tmp_path / "shot.png").write_bytes(shot)
    corner = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))[:4, :4].mean()
    assert (corner < 60) if dark else (corner > 250)
