"""Round trips over random sites, ranks, kinds and dtypes."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora, save_lora
from hyperlora_jax.lora_files.safetensors_io import write
from hyperlora_jax.lora_files.writing import FORMATS
from tests.lora_files.conftest import random_lora
from tests.lora_files.foreign import random_tensors
from tests.lora_files.test_round_trip import contents, deltas

BLOCK = "up_blocks.1.attentions.2.transformer_blocks.0."
LAYERS = {
    BLOCK + "attn1.to_q": ("linear", (1, 1)),
    BLOCK + "attn1.to_out.0": ("linear", (1, 1)),
    BLOCK + "attn2.to_v": ("linear", (1, 1)),
    BLOCK + "ff.net.0.proj": ("linear", (1, 1)),
    BLOCK + "ff.net.2": ("linear", (1, 1)),
    "up_blocks.1.attentions.2.proj_in": ("conv", (1, 1)),
    "mid_block.resnets.1.conv2": ("conv", (3, 3)),
    "mid_block.resnets.0.time_emb_proj": ("linear", (1, 1)),
    "up_blocks.0.upsamplers.0.conv": ("conv", (3, 3)),
    "down_blocks.0.downsamplers.0.conv": ("conv", (3, 3)),
    "down_blocks.1.resnets.0.conv_shortcut": ("conv", (1, 1)),
}
TEXT = "text_encoder.text_model.encoder.layers.3.self_attn.v_proj"
SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def site_rows(draw, text=True):
    names = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, unique=True))
    rows = []
    for name in names + ([TEXT] if text and draw(st.booleans()) else []):
        kind, window = LAYERS.get(name, ("linear", (1, 1)))
        sizes = st.integers(4, 9)
        stride = (2, 2) if "downsamplers" in name else (1, 1)
        rank = draw(st.integers(1, 4))
        rows.append((name, draw(sizes), draw(sizes), rank, kind, window, stride))
    return rows


def spec_of_rows(rows):
    """Not in the strategy: beartype draws from `random`, which hypothesis forbids there."""
    return LoraSpec(tuple(LoraSite(*row) for row in rows))


@pytest.mark.parametrize("format", FORMATS)
@SETTINGS
@given(data=st.data())
def test_written_files_mean_the_same(tmp_path, format, data):
    spec = spec_of_rows(data.draw(site_rows(text=format != "weights2weights")))
    dtype = data.draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    size = data.draw(st.sampled_from([1e-3, 0.2, 30.0]))
    lora = random_lora(spec, data.draw(st.integers(0, 99)), size)
    first = save_lora(tmp_path / "a", lora, spec, format, dtype)
    back, found = load_lora(first)
    assert found == (spec.with_rank(spec.max_rank) if format == "weights2weights" else spec)
    exact = dtype == "float32" and format in ("diffusers", "peft")
    relative = 0 if exact else {"float32": 5e-7, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    for path, wanted in deltas(lora, spec).items():
        error = np.abs(deltas(back, found)[path] - wanted).max()
        assert error <= relative * np.abs(wanted).max() + (0 if exact else 1e-7)
    assert contents(first) == contents(save_lora(tmp_path / "b", back, found, format, dtype))


@pytest.mark.parametrize("form", ["old", "kohya", "comfy"])
@SETTINGS
@given(data=st.data())
def test_foreign_files_are_folded(tmp_path, form, data):
    spec = spec_of_rows(data.draw(site_rows()))
    dtype = data.draw(st.sampled_from([np.float32, np.float16]))
    shapes = st.sampled_from([(), (1,)])
    kinds = st.sampled_from([np.float32, np.float16, np.int64])
    values = st.integers(1, 32)
    alphas = {
        site.path: np.full(data.draw(shapes), data.draw(values), data.draw(kinds))
        for site in spec
        if data.draw(st.booleans())
    }
    tensors, wanted = random_tensors(spec, form, "sd1", data.draw(values), dtype, alphas)
    write(tmp_path / "a.safetensors", tensors, {})
    lora, found = load_lora(tmp_path / "a.safetensors")
    assert found == spec
    for path, value in deltas(lora, found).items():
        assert np.abs(value - wanted[path]).max() <= 1e-6 * np.abs(wanted[path]).max()
