"""A tiny spec and made-up subjects of it."""

import numpy as np

from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.pictures.pictures import encode_png
from hyperlora_jax.pictures.subjects import Subject

SPEC = LoraSpec(
    (
        LoraSite("down_blocks.0.attentions.0.to_q", 6, 4, 2),
        LoraSite("down_blocks.0.resnets.0.conv1", 3, 5, 2, "conv", (3, 3)),
    )
)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 255, (12, 10, 3), np.uint8)


def subject(k, identity=None, lora=True, **fields):
    random = np.random.default_rng(k)
    vector = random.normal(size=SPEC.num_parameters).astype(np.float32) if lora else None
    given = {
        "id": f"subject {k}/a",
        "identity": identity or f"person {k}",
        "references": (encode_png(picture(k)), encode_png(picture(k + 1))),
        "targets": (encode_png(picture(k + 2)),),
        "captions": ("smiling, héllo",),
        "lora": vector,
        "embeddings": {"tiny": random.normal(size=(2, 3)).astype(np.float32)},
        "seed": k,
        "num_steps": 50,
        "loss_curve": np.linspace(1, 0.5, 4, dtype=np.float32),
    }
    return Subject(**{**given, **fields})


def assert_same(a, b):
    for name in ("id", "identity", "references", "targets", "captions", "seed", "num_steps"):
        assert getattr(a, name) == getattr(b, name), name
    np.testing.assert_array_equal(a.loss_curve, b.loss_curve)
    np.testing.assert_array_equal(a.lora, b.lora)
    assert a.embeddings.keys() == b.embeddings.keys()
    for encoder in a.embeddings:
        np.testing.assert_array_equal(a.embeddings[encoder], b.embeddings[encoder])
