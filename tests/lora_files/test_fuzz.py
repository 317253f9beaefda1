"""Damaged files: a named refusal or the right numbers, never a crash, a hang or a wrong load."""

import json
import time
import tracemalloc

import jax
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora, save_lora
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


def test_a_few_hundred_damaged_files(tmp_path):
    check(tmp_path, 700)


@pytest.mark.slow
def test_many_damaged_files(tmp_path):
    check(tmp_path, 12_000)
