import json

import numpy as np
import pytest

from hyperlora_jax.evaluate.audits import quality_curves
from hyperlora_jax.evaluate.audits.quality_curves import headlines, run_curve

STEPS = (0, 10, 100, 400)


def advance(loras, done, steps):
    """A fit that halves the distance to 1 every 50 steps, at 0.1 s a step."""
    return {"x": 1.0 - (1.0 - loras["x"]) * 0.5 ** ((steps - done) / 50)}, 0.1 * (steps - done)


def score(loras):
    return {"identity_top1": loras["x"], "image_error": 1.0 - loras["x"]}


@pytest.fixture(scope="module")
def curves():
    zero, good = {"x": np.full((4, 2), 0.0)}, {"x": np.full((4, 2), 0.9)}
    return {
        "zero": run_curve(zero, advance, score, STEPS),
        "hypernetwork": run_curve(good, advance, score, STEPS, start_seconds=0.4),
    }


def test_headlines(curves):
    full = curves["zero"].scores["identity_top1"][-1]
    found = headlines(curves, full)
    assert (found["zero"].steps, found["hypernetwork"].steps) == (400, 100)
    assert found["zero"].seconds_per_lora == pytest.approx(10.0)
    assert found["hypernetwork"].seconds_per_lora == pytest.approx((0.4 + 10.0) / 4)
    easy = headlines(curves, full, target=0.9)
    assert easy["hypernetwork"].steps == 0
    assert easy["hypernetwork"].seconds_per_lora == pytest.approx(0.1)


def test_never_reached(curves):
    found = headlines({"zero": curves["zero"]}, np.full((4, 2), 2.0))["zero"]
    assert found.steps is None and found.seconds_per_lora is None
    assert found.relative.mean == pytest.approx(0.5, abs=0.01)


def test_interrupted_fit_equals_whole(curves):
    whole, _ = advance({"x": np.zeros((4, 2))}, 0, 400)
    np.testing.assert_allclose(curves["zero"].scores["identity_top1"][-1], whole["x"])


def test_json_and_chart(curves):
    full = curves["zero"].scores["identity_top1"][-1]
    text = json.dumps(quality_curves.to_json(curves, headlines(curves, full)))
    assert json.loads(text)["curves"]["zero"]["steps"] == list(STEPS)
    steps, means = quality_curves.chart_series(curves)["hypernetwork"]
    assert steps == list(STEPS) and means[0] == pytest.approx(0.9)


def test_misuse():
    with pytest.raises(ValueError, match="ascend from 0"):
        run_curve({"x": np.zeros(2)}, advance, score, (5, 10))
