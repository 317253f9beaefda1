import io
import json

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.audits.quality_curves import run_curve
from hyperlora_jax.evaluate.report import sections, verdicts

RANDOM = np.random.default_rng(0)


def lora(count):
    def pair(width, out):
        down = RANDOM.standard_normal((count, width, 2))
        up = RANDOM.standard_normal((count, 2, out))
        return {"down": down.astype(np.float32), "up": up.astype(np.float32)}

    return {"mid": {"to_q": pair(6, 5), "to_v": pair(6, 4)}}


def check(section):
    json.dumps(section.numbers)
    for figure in section.figures:
        assert Image.open(io.BytesIO(figure.png)).size[0] > 90
        assert figure.caption
    assert len({figure.name for figure in section.figures}) == len(section.figures)
    return section.numbers


def test_memorisation():
    training = lora(20)
    numbers = check(sections.memorisation_section(lora(5), training, {"nearer_to_training": 0.0}))
    assert set(numbers["weights"]) == {"delta", "pca"} and "images" in numbers
    copies = {"mid": {s: {k: v[:5] for k, v in p.items()} for s, p in training["mid"].items()}}
    summary = {"memorisation": check(sections.memorisation_section(copies, training))}
    assert [line["tone"] for line in verdicts._memorisation_verdict(summary)] == ["bad", "bad"]


def test_weights():
    numbers = check(sections.weight_section(lora(5), lora(5)))
    assert set(numbers["site_cosine"]) == {"mid/to_q", "mid/to_v"}
    assert len(numbers["spectrum"]["fitted"]) == 2


def test_site_names_are_short():
    paths = [f"down_blocks_1/attentions_{k}/transformer_blocks_0/attn2/to_out_0" for k in (0, 1)]
    values = dict(zip(paths, (1.0, 3.0), strict=True))
    assert sections.grouped(values) == {"down 1.0 attn2 out": 1.0, "down 1.1 attn2 out": 3.0}
    assert sections.grouped(values, most=1) == {"down 1 attn2 out": 2.0}
    middle = "mid_block/attentions_0/transformer_blocks_0/attn1/to_q"
    assert list(sections.grouped({middle: 1.0}, most=0)) == ["mid attn1 q"]


def test_steps():
    def advance(loras, done, steps):
        return {"x": loras["x"] + 0.01 * (steps - done)}, float(steps - done)

    def score(loras):
        return {"identity_top1": np.minimum(loras["x"], 1.0)}

    curves = {
        name: run_curve({"x": np.full((4,), start)}, advance, score, (0, 10, 100))
        for name, start in (("zero", 0.0), ("hypernetwork", 0.96))
    }
    numbers = check(sections.steps_section(curves, np.ones(4)))
    (verdict,) = verdicts._steps_verdict({"steps_to_quality": numbers})
    assert verdict["tone"] == "good" and "after 0 steps" in verdict["text"]
    assert "after 100 steps (25 s per LoRA) from nothing" in verdict["text"]
    assert verdicts._when({"steps": None}) == "never"


def test_learning(tmp_path):
    rows = [{"step": k, "loss": 1.0 / k} for k in range(1, 60)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert check(sections.learning_section(file))["num_logged"] == 59
    assert sections._smooth([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    file.write_text("{}")
    with pytest.raises(UserError, match=r"expected a metrics\.jsonl"):
        sections.learning_section(file)


def test_interpolation():
    strips = RANDOM.random((2, 3, 8, 8, 3))
    check(sections.interpolation_section(strips, [0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="a picture per weight"):
        sections.interpolation_section(strips, [0.0, 1.0])
