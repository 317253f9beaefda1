"""Damaged files: a named refusal or the right numbers, never a crash, a hang or a wrong load."""

import json
import time
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora, save_lora
from hyperlora_jax.lora_files.compatibility import inspect_lora
from hyperlora_jax.lora_files.safetensors_io import write
from tests.lora_files.conftest import random_lora

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
SPEC = LoraSpec(
    (
        LoraSite(BLOCK + "attn1.to_q", 6, 6, 2),
        LoraSite(BLOCK + "attn2.to_k", 5, 6, 2),
        LoraSite("down_blocks.0.resnets.0.conv1", 4, 6, 2, "conv", (3, 3)),
    )
)
OTHER_DTYPES = ("F64", "F16", "BF16", "I64", "U8", "F8_E4M3", "Q9")


def parts(content):
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def rebuilt(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def flip_header_bits(random, content):
    size = int.from_bytes(content[:8], "little")
    data = bytearray(content)
    for _ in range(random.integers(1, 4)):
        data[random.integers(0, 8 + size)] ^= 1 << random.integers(0, 8)
    return bytes(data)


def flip_data_bits(random, content):
    size = int.from_bytes(content[:8], "little")
    data = bytearray(content)
    data[random.integers(8 + size, len(content))] ^= 1 << random.integers(0, 8)
    return bytes(data)


def cut(random, content):
    return content[: random.integers(0, len(content))]


def append(random, content):
    return content + random.bytes(random.integers(1, 50))


def huge_header(random, content):
    return int(random.integers(0, 2**63)).to_bytes(8, "little") + content[8:]


def change_offsets(random, content):
    header, body = parts(content)
    names = [name for name in header if name != "__metadata__"]
    entry = header[names[random.integers(len(names))]]
    entry["data_offsets"][random.integers(2)] += int(random.integers(-64, 64)) or 1
    return rebuilt(header, body)


def change_shape(random, content):
    header, body = parts(content)
    names = [name for name in header if name != "__metadata__" and header[name]["shape"]]
    entry = header[names[random.integers(len(names))]]
    entry["shape"][random.integers(len(entry["shape"]))] = int(random.integers(-2, 2**40))
    return rebuilt(header, body)


def swap_shapes(random, content):
    """A reshaped: the same bytes claim to be the transposed factor."""
    header, body = parts(content)
    for name, entry in header.items():
        if "lora_down" in name or "lora_up" in name:
            entry["shape"] = entry["shape"][:2][::-1] + entry["shape"][2:]
    return rebuilt(header, body)


def change_dtype(random, content):
    header, body = parts(content)
    names = [name for name in header if name != "__metadata__"]
    header[names[random.integers(len(names))]]["dtype"] = str(random.choice(OTHER_DTYPES))
    return rebuilt(header, body)


def rename(random, content):
    header, body = parts(content)
    names = [name for name in header if name != "__metadata__"]
    name = names[random.integers(len(names))]
    wrong = ("../../etc/passwd", "/dev/zero", name + ".x", name[1:], name.replace("down", "up"), "")
    entry = header.pop(name)
    header[str(random.choice(wrong))] = entry
    return rebuilt(header, body)


def drop(random, content):
    header, body = parts(content)
    names = [name for name in header if name != "__metadata__"]
    del header[names[random.integers(len(names))]]
    return rebuilt(header, body)


def overlap(random, content):
    """Two tensors of one size claim the same bytes; the file ends where they do."""
    header, body = parts(content)
    names = [name for name in header if name != "__metadata__"]
    first = header[names[random.integers(len(names))]]
    size = int(np.subtract(*first["data_offsets"][::-1]))
    same = [n for n in names if np.subtract(*header[n]["data_offsets"][::-1]) == size]
    for name in same:
        header[name]["data_offsets"] = list(first["data_offsets"])
    if len(same) == 1:
        header[same[0]]["data_offsets"] = [0, size] if first["data_offsets"][0] else [4, 4 + size]
    return rebuilt(header, body)


def duplicate(random, content):
    """One name twice in the JSON text; parsers keep the last."""
    header, body = parts(content)
    names = [name for name in header if name != "__metadata__"]
    name = names[random.integers(len(names))]
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    return len(text.encode()).to_bytes(8, "little") + text.encode() + body


def not_finite(random, content):
    header, body = parts(content)
    names = [name for name in header if name != "__metadata__"]
    begin, _ = header[names[random.integers(len(names))]]["data_offsets"]
    data = bytearray(body)
    data[begin : begin + 4] = np.array(random.choice([np.nan, np.inf]), np.float32).tobytes()
    return rebuilt(header, bytes(data))


def nested(random, content):
    return rebuilt({}, b"")[:8] + b"{" * random.integers(1, 3000)


def pickled(random, content):
    return random.choice([b"\x80\x02", b"\x80\x04", b"PK\x03\x04"]) + random.bytes(200)


def noise(random, content):
    return random.bytes(random.integers(0, 300))


DAMAGES = (
    flip_header_bits, flip_data_bits, cut, append, huge_header, change_offsets, change_shape,
    swap_shapes, change_dtype, rename, drop, overlap, duplicate, not_finite, nested, pickled, noise,
)  # fmt: skip


def fuzz(folder, count):
    """(refusals by reason kind, silent loads that equal the original)."""
    path = save_lora(folder / "good.safetensors", random_lora(SPEC), SPEC, dtype="float32")
    good = path.read_bytes()
    wanted, _ = load_lora(path)
    random = np.random.default_rng(0)
    damaged = folder / "damaged.safetensors"
    harmless, slowest, peak = 0, 0.0, 0
    tracemalloc.start()
    for i in range(count):
        damage = DAMAGES[i % len(DAMAGES)]
        content = damage(random, good)
        damaged.write_bytes(content)
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        start = time.perf_counter()
        try:
            lora, _ = load_lora(damaged)
        except UserError as error:
            assert "damaged.safetensors" in str(error), damage.__name__
            assert "\n" not in str(error), damage.__name__
        else:
            # Only header bits that mean nothing (a text of the metadata) may pass.
            assert damage is flip_header_bits, damage.__name__
            jax.tree.map(np.testing.assert_array_equal, lora, wanted)
            harmless += 1
        slowest = max(slowest, time.perf_counter() - start)
        grown = tracemalloc.get_traced_memory()[1] - held
        peak = max(peak, grown - 2 * len(content))
    tracemalloc.stop()
    return harmless, slowest, peak


def check(folder, count):
    harmless, slowest, peak = fuzz(folder, count)
    assert harmless < count / 10
    assert slowest < 2
    assert peak < 50_000_000


STEMS = (
    "lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_input_blocks_1_0_in_layers_2",
    "unet.mid_block.resnets.0.conv1", "base_model.model.conv_in", "lycoris_mid_block_proj_in",
    "lora_te1_encoder_layers_0_mlp_fc1", "clip_g.encoder.layers.0.mlp.fc1", "bundle_emb.",
    "diffusion_model.out.2", "lora_te2_text_projection", "unet:0", "",
)  # fmt: skip
ENDINGS = (
    ".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.default.weight", ".alpha",
    ".scale", ".diff_b", ".w_norm", ".lora.down.weight", "_lora.up.weight", ".hada_w1_a", "a.l",
)  # fmt: skip
FIELDS = ("r", "unet.r", "lora_alpha", "unet.lora_alpha", "rank_pattern", "peft_type", "use_dora",
          "init_lora_weights", "alpha_pattern", "unet.alpha_pattern", "bias", "new")  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
TENSORS = st.dictionaries(
    st.builds(str.__add__, st.sampled_from(STEMS), st.sampled_from(ENDINGS)),
    st.tuples(
        st.lists(st.sampled_from((0, 1, 2, 3, 8)), max_size=5),
        st.sampled_from(("float32", "float16", "float8_e4m3fn", "int8", "bool")),
        st.sampled_from((1.0, 0.0, np.nan)),
    ),
    max_size=6,
)


def read_mangled(folder, tensors, config, header):
    """Every reader ends with a LoRA or with one line."""
    import ml_dtypes  # noqa: F401  (numpy knows float8 by it)

    with np.errstate(invalid="ignore"):
        arrays = {
            key: np.full(shape, fill).astype(dtype) for key, (shape, dtype, fill) in tensors.items()
        }
    text = json.dumps(config)
    write(folder / "adapter_model.safetensors", arrays, header)
    (folder / "adapter_config.json").write_text(text)
    write(folder / "a.safetensors", arrays, header | {"lora_adapter_metadata": text})
    write(folder / "b.safetensors", arrays, header)
    for path in (folder, folder / "a.safetensors", folder / "b.safetensors"):
        for drop in ((), ("differences", "conv_in")):
            try:
                spec = load_lora(path, None, drop)[1]
                inspect_lora(path)
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert spec.sites


MANGLED = {
    "tensors": TENSORS,
    "config": VALUES | st.dictionaries(st.sampled_from(FIELDS), VALUES),
    "header": st.dictionaries(
        st.sampled_from(("ss_base_model_version", "ss_v2", "modelspec.architecture")),
        st.sampled_from(("sd_v1", "sdxl_base", "True", "stable-diffusion-v2-512/lora", "")),
    ),
}
ANY_TIME = {"deadline": None, "derandomize": True,
            "suppress_health_check": list(HealthCheck)}  # fmt: skip


@settings(max_examples=60, **ANY_TIME)
@given(**MANGLED)
@example(tensors={f"{STEMS[0]}{ENDINGS[0]}": ([0], "float32", 1.0)}, config={"r": 0}, header={})
def test_mangled_keys_shapes_and_configs(tmp_path, tensors, config, header):
    read_mangled(tmp_path, tensors, config, header)


@pytest.mark.slow
@settings(max_examples=6000, **ANY_TIME)
@given(**MANGLED)
def test_many_mangled_keys_shapes_and_configs(tmp_path, tensors, config, header):
    read_mangled(tmp_path, tensors, config, header)


def test_a_few_hundred_damaged_files(tmp_path):
    check(tmp_path, 700)


@pytest.mark.slow
def test_many_damaged_files(tmp_path):
    check(tmp_path, 12_000)
