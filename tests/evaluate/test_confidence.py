import numpy as np
import pytest

from hyperlora_jax.evaluate.audits.confidence import auc, confidence_section, strangers
from hyperlora_jax.worlds.avatars import Avatars


@pytest.fixture
def references():
    return np.random.default_rng(1).uniform(0.0, 0.5, (6, 16, 16, 3)).astype(np.float32)


def test_auc_of_known_cases():
    low, high = np.arange(4.0), np.arange(4.0) + 10
    assert auc(high, low) == 1.0
    assert auc(low, high) == 0.0
    assert auc(low, low) == 0.5


def test_strangers_are_as_many_and_of_the_same_size(references):
    found = strangers(references, Avatars("pixel-art"))
    assert len(found) == 6
    for kind, pictures in found.items():
        assert pictures.shape == references.shape, kind
        assert 0.0 <= pictures.min() <= pictures.max() <= 1.0, kind
    mixed = found["its pixels in random order"]
    np.testing.assert_allclose(mixed.mean((1, 2)), references.mean((1, 2)), rtol=1e-5)
    people = [kind for kind in found if kind.startswith("people of")]
    assert len(people) == 2
    assert "people of pixel-art" not in people
    assert set(strangers(references)) == set(found) - set(people)


def test_a_dark_domain_is_told_from_bright_strangers(references):
    def dark(pictures):
        return 1.0 - pictures.mean((1, 2, 3))

    losses = references.mean((1, 2, 3))
    section = confidence_section(dark, references, strangers(references), losses)
    found = section.numbers["strangers"]
    assert found["negative"]["auc"] == 1.0
    assert found["upside down"]["auc"] == pytest.approx(0.5)
    assert section.numbers["rank_correlation_with_error"]["rho"] == pytest.approx(-1.0)
    assert section.figures[0].png.startswith(b"\x89PNG")
