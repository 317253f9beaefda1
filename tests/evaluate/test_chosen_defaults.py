from unittest import mock

import numpy as np
import pytest

from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.evaluate.compare import MethodResult, Scores
from hyperlora_jax.evaluate.own_source import ChosenDefaults
from hyperlora_jax.evaluate.protocol import Questions
from hyperlora_jax.hypernet.baselines import make_baseline
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora.sites import LoraSite, LoraSpec


@pytest.fixture(name="hyper")
def _hyper():
    facts = {"default_strength": 1.5, "generate": {"guidance": 2.0, "format": "peft"}}
    spec = LoraSpec((LoraSite("down_blocks.0.attn1.to_q", 6, 8, 2, "linear"),))
    return Hypernetwork(make_baseline("mean", spec), {}, mock.Mock(spec=ImageEncoder), facts, {})


def chosen(strength, guidance=None):
    scores = Scores(*np.zeros((2, 1, 1)), np.zeros((1, 1, 1)), np.ones(1), 0, np.zeros((1, 1), int))
    guided = {1.0: scores, guidance: scores} if guidance else {}
    return MethodResult(
        np.zeros((1, 1, 2, 2, 3), np.float32), scores, strength, {}, guidance or 1.0, guided
    )


def asked(count):
    pixels = np.zeros((count, 1, 2, 2, 3), np.uint8)
    words = (("",),) * count
    return Questions(
        "validation", ("",) * count, words, pixels, words, np.zeros((count, 1), int),
        {"source": "data/faces"},
    )  # fmt: skip


def test_on_its_own_pictures_the_checkpoint_keeps_the_strength_and_both_are_said(hyper):
    found = ChosenDefaults.of(hyper, chosen(0.75), asked(16), kept=True)
    assert found.line("run") == (
        "run: default strength 1.5 → 0.75, chosen on 16 validation subjects of faces"
    )
    after = found.applied(hyper)
    assert after.default_strength == 0.75 and after.facts["generate"] == hyper.facts["generate"]
    assert after.facts["default_strength_chosen_on"] == "16 validation subjects of faces"
    again = ChosenDefaults.of(after, chosen(0.75), asked(1), kept=True)
    assert again.line("run") == (
        "run: default strength stays 0.75, chosen on 1 validation subject of faces"
    )


def test_guidance_is_said_where_it_was_chosen(hyper):
    found = ChosenDefaults.of(hyper, chosen(0.75, 3.0), asked(2), kept=True)
    assert "default strength 1.5 → 0.75, default guidance 2 → 3" in found.line("run")
    assert found.applied(hyper).facts["generate"] == {"guidance": 3.0, "format": "peft"}


def test_on_other_pictures_they_stay(hyper):
    found = ChosenDefaults.of(hyper, chosen(0.75), asked(2), kept=False)
    assert found.line("run") == (
        "run: default strength stays 1.5, as these are not the pictures that it was trained on "
        "(best on 2 validation subjects of faces: strength 0.75)"
    )
