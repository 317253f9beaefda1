"""LoRA files spoilt in every way we could think of, each with the reason that must be given."""

import json

import numpy as np

from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import safetensors_io, save_lora

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
V = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
CONV = "down_blocks.0.resnets.0.conv1"
SPEC = LoraSpec(
    (LoraSite(Q, 12, 8, 2), LoraSite(V, 12, 8, 2), LoraSite(CONV, 6, 8, 2, "conv", (3, 3)))
)
BASE = "b" * 64


def good(path, seed=0, spec=SPEC, format="diffusers", **options):
    """A sound file; returns its vector."""
    vector = np.random.default_rng(seed).normal(size=spec.num_parameters).astype(np.float32)
    lora = vectorize.unflatten(vector, spec)
    save_lora(path, lora, spec, format, "float32", family="sd1", **options)
    return vector


def _tensors(path):
    tensors, _ = safetensors_io.read(path)
    return {name: np.array(value) for name, value in tensors.items()}


def _change(edit, metadata=None):
    def damage(path):
        good(path)
        tensors = _tensors(path)
        edit(tensors)
        safetensors_io.write(path, tensors, metadata or {})

    return damage


def _bytes(edit):
    def damage(path):
        good(path)
        path.write_bytes(edit(path.read_bytes()))

    return damage


def _header(edit):
    def change(content):
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        edit(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return _bytes(change)


def _spec(spec):
    return lambda path: good(path, spec=spec)


A, B = f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight"


def _first_entry(header):
    return next(value for name, value in header.items() if name != "__metadata__")


def _shift(entry, offset):
    entry["data_offsets"] = [position + offset for position in entry["data_offsets"]]


DAMAGES = {
    "cut": (_bytes(lambda c: c[:-40]), "outside the file"),
    "cut in the header": (_bytes(lambda c: c[:100]), "cut off"),
    "empty": (_bytes(lambda c: b""), "empty file"),
    "huge header": (_bytes(lambda c: b"\xff" * 7 + b"\x00" + c[8:]), "header of"),
    "no json": (_bytes(lambda c: c[:8] + b"[" + c[9:]), "no valid JSON"),
    "pickle": (_bytes(lambda c: b"\x80\x02}q\x00." + c), "a Python pickle"),
    "zip": (_bytes(lambda c: b"PK\x03\x04" + c), "a zip archive"),
    "web page": (_bytes(lambda c: b"<!DOCTYPE html><html>"), "HTML or XML"),
    "lfs pointer": (_bytes(lambda c: b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "more bytes": (_bytes(lambda c: c + b"more"), "after the last tensor"),
    "overlap": (_header(lambda h: _shift(list(h.values())[-1], -4)), "overlaps another tensor"),
    "hole": (_header(lambda h: _shift(_first_entry(h), 4)), "leaves a hole before"),
    "negative offset": (
        _header(lambda h: _first_entry(h).update(data_offsets=[-8, 8])),
        "data_off",
    ),
    "huge shape": (_header(lambda h: _first_entry(h).update(shape=[2**40, 2**40])), "its shape"),
    "strange dtype": (_header(lambda h: _first_entry(h).update(dtype="X7")), "unsupported dtype"),
    "nothing": (_change(lambda t: t.clear()), "holds no tensors"),
    "nan": (_change(lambda t: t[A].__setitem__((0, 0), np.nan)), "NaN or Inf"),
    "inf": (_change(lambda t: t[B].__setitem__((0, 0), np.inf)), "NaN or Inf"),
    "integers": (_change(lambda t: t.update({A: t[A].astype(np.int32)})), "dtype int32"),
    "half missing": (_change(lambda t: t.pop(B)), "lacks its up factor"),
    "site missing": (_change(lambda t: (t.pop(A), t.pop(B))), "lacks 1 of 3 sites"),
    "swapped": (_change(lambda t: t.update({A: t[B], B: t[A]})), "ranks differ|above both sizes"),
    "ranks differ": (_change(lambda t: t.update({A: t[A][:1]})), "ranks differ"),
    "dimensions": (_change(lambda t: t.update({A: t[A][None]})), "expected two 2-D"),
    "zero alpha": (_change(lambda t: t.update({f"unet.{Q}.alpha": np.float32(0)})), "alpha"),
    "unknown key": (_change(lambda t: t.update({"epoch": np.zeros(1)})), "1 of 7 keys"),
    "full model": (
        lambda path: safetensors_io.write(path, {"conv_in.weight": np.zeros((4, 4))}, {}),
        "no key belongs to a Stable Diffusion LoRA",
    ),
    "transformer": (
        lambda path: safetensors_io.write(
            path,
            {
                f"transformer.single_transformer_blocks.0.attn.to_q.lora_{s}.weight": np.zeros(
                    (4, 4)
                )
                for s in "AB"
            },
            {},
        ),
        "diffusion transformer",
    ),
    "other base": (
        _spec(LoraSpec((LoraSite(Q, 16, 8, 2), *SPEC.sites[1:]))),
        "layer .*to_q is 16→8 in the file, 12→8 in the base",
    ),
    "other layers": (
        _spec(LoraSpec((LoraSite(Q.replace("to_q", "to_k"), 12, 8, 2),))),
        "of other layers",
    ),
    "more sites": (
        _spec(LoraSpec((*SPEC.sites, LoraSite(Q.replace("to_q", "to_k"), 12, 8, 2)))),
        "1 sites beyond the 3 expected",
    ),
    "other weights": (
        lambda path: good(path, metadata={"base_hash": "c" * 64}),
        "made for base cccccccccccc, this base is bbbbbbbbbbbb",
    ),
}
