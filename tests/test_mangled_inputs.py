"""Configs, metadata files and pictures with something wrong: read, or refused in one line."""

import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures.image_folder import open_image_folder
from hyperlora_jax.pictures.pictures import decode
from hyperlora_jax.stable_diffusion.weights import loading
from hyperlora_jax.stable_diffusion.weights.clip_tokenizer import load_tokenizer
from tests.stable_diffusion import conftest as tiny
from tests.user_world import write_base

FEW, MANY = 60, 1500
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json",
           "scheduler/scheduler_config.json")  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.sampled_from([-1, 0, 1, 2, 3, 7, 10**30, -0.5, 1.5, float("nan")]),
    st.sampled_from(["", "linear", "CrossAttnDownBlock2D", "é\u2028", "1000"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=5,
)
SPLICE = st.tuples(st.floats(0, 1), st.floats(0, 1), st.binary(max_size=6))


def spliced(content, cuts):
    """Bytes replaced in some places, or the end cut off."""
    for start, end, other in cuts:
        first, last = sorted(int(place * len(content)) for place in (start, end))
        last = last if last == len(content) else min(last, first + 6)
        content = content[:first] + other + content[last:]
    return content


def one_line(call):
    """Runs it; a refusal must be one line."""
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error).strip(), str(error)


def check(count, *strategies):
    """Decorates a function of drawn values: `count` examples, the same ones every time."""
    return lambda body: settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )(given(*strategies)(body))  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_configs(count, tmp_path):
    root = write_base(tmp_path / "base")
    whole = {name: (root / name).read_text() for name in CONFIGS}
    keys = {name: sorted(json.loads(text)) for name, text in whole.items()}

    @check(count, st.sampled_from(CONFIGS), st.data(), st.lists(SPLICE, max_size=1))
    def run(name, data, cuts):
        values = json.loads(whole[name])
        changes = st.dictionaries(st.sampled_from([*keys[name], "new"]), VALUES, max_size=3)
        text = json.dumps({**values, **data.draw(changes)}).encode()
        (root / name).write_bytes(spliced(text, cuts))
        one_line(lambda: (loading.load_modules(root, np.float32, loading.CONSTRUCTORS),
                          loading.load_schedule(root).betas))  # fmt: skip
        (root / name).write_text(whole[name])

    run()


@pytest.mark.parametrize("count", COUNTS)
def test_tokenizers(count, tmp_path):
    tiny.write_tokenizer(tmp_path)
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    @check(count, st.sampled_from(sorted(whole)), st.lists(SPLICE, min_size=1, max_size=3))
    def run(name, cuts):
        (tmp_path / name).write_bytes(spliced(whole[name], cuts))
        one_line(lambda: load_tokenizer(tmp_path))
        (tmp_path / name).write_bytes(whole[name])

    run()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "1.txt"])
def test_metadata(count, name, tmp_path):
    folder = tmp_path / "anna"
    folder.mkdir()
    for picture in ("1.png", "2.png"):
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder / picture)
    rows = [{"file_name": "1.png", "text": "a cat"}, {"file_name": "2.png", "role": "target"}]
    text = {
        "metadata.jsonl": "\n".join(map(json.dumps, rows)),
        "metadata.csv": "file_name,text,identity\n1.png,a cat,anna\n2.png,\"a, dog\",anna\n",
        "1.txt": "a cat\nsecond",
    }[name]  # fmt: skip
    values = st.dictionaries(st.sampled_from(["file_name", "text", "role", "x"]), VALUES)

    @check(count, st.lists(SPLICE, max_size=3), st.one_of(st.none(), values))
    def run(cuts, row):
        content = spliced(text.encode(), cuts)
        if row is not None and name.endswith("jsonl"):
            content += b"\n" + json.dumps(row).encode()
        (folder / name).write_bytes(content)
        one_line(lambda: open_image_folder(tmp_path))

    run()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_pictures(count, form):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, form, **({} if form in ("GIF", "TIFF") else {"exif": exif}))

    @check(count, st.lists(SPLICE, min_size=1, max_size=3))
    def run(cuts):
        one_line(lambda: decode(spliced(file.getvalue(), cuts), 16, "a picture"))

    run()
