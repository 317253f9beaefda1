"""Sections of a whole evaluation, with a stand-in for the base model."""

import types

import jax
import numpy as np

from hyperlora_jax.evaluate.audits import analysis
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import spec_from_shapes
from hyperlora_jax.stable_diffusion.model import StableDiffusion

SHAPES = {"mid": {"to_q": {"kernel": np.zeros((6, 5))}, "to_v": {"kernel": np.zeros((6, 4))}}}
SPEC = spec_from_shapes(SHAPES, ["to_q", "to_v"], 2)


class Recorder(StableDiffusion):
    """Draws a flat picture; keeps the LoRAs and noise it was asked to draw with."""

    unet = types.SimpleNamespace(settings=types.SimpleNamespace(sample_size=(4, 4), out_channels=2))

    def __init__(self):
        self.calls = []

    def sample(self, key, prompts, *, lora, strength, num_steps, guidance, latents):
        self.calls.append((prompts, lora, latents))
        return np.full((len(prompts), 16, 16, 3), 0.5, np.float32)


def random_loras(count):
    rng = np.random.default_rng(count)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), factors.zeros(SPEC, count)
    )


def test_the_lora_between_two_people_is_their_mixture(test_set):
    sd, loras = Recorder(), random_loras(6)
    strips = analysis.interpolation_strips(sd, test_set, loras, 1.0, 2)
    assert strips.shape == (3, len(analysis.WEIGHTS), 16, 16, 3)
    prompts, between, noise = sd.calls[1]
    assert set(prompts) == {test_set.captions[2][0]} and np.ptp(noise, axis=0).max() == 0
    mixed = factors.delta(between["mid"]["to_q"])
    own = factors.delta(loras["mid"]["to_q"])
    for k, weight in enumerate(analysis.WEIGHTS):
        expected = (1 - weight) * own[2] + weight * own[3]
        np.testing.assert_allclose(mixed[k], expected, atol=1e-5)


def test_a_copied_training_identity_is_found(avatars, test_set):
    known = frozenset(avatars.identity("train", k).id for k in range(20))
    suspects = analysis._training_renders(avatars, test_set, known, test_set.num_captions)
    assert suspects.shape[:3] == (6, 3, 20)
    view = avatars.views("test", test_set.pool.shape[1], 0)[test_set.caption_index[4, 1]]
    drawn = avatars.render(avatars.identity("train", 7), view) / 255.0
    np.testing.assert_allclose(suspects[4, 1, 7], drawn, atol=1e-6)


def run(test_set, avatars, pictures, generated, training_ids=frozenset()):
    training = np.asarray(vectorize.flatten(random_loras(8), SPEC))
    conventional = factors.index(random_loras(6), slice(3))
    made = [
        *analysis.copies_section(
            SPEC, avatars, test_set, generated, pictures, training, training_ids
        ),
        *analysis.weight_sections(Recorder(), test_set, generated, conventional, 1.0, 2),
    ]
    return {section.name: section for section in made}


def test_sections_about_generated_loras(test_set, avatars):
    known = frozenset(avatars.identity("train", k).id for k in range(20))
    found = run(test_set, avatars, test_set.exact, random_loras(6), known)
    assert list(found) == ["memorisation", "weights", "interpolation"]
    assert found["memorisation"].numbers["images"]["nearer_to_training"] == 0.0


def test_a_generator_that_copies_fails_the_audit(test_set, avatars):
    copies = factors.index(random_loras(8), slice(6))
    found = run(test_set, avatars, test_set.exact, copies)
    assert not found["memorisation"].numbers["weights"]["delta"]["passed"]


def test_without_avatars_only_weights_are_audited(test_set):
    found = run(test_set, None, test_set.exact, random_loras(6))
    assert "images" not in found["memorisation"].numbers
