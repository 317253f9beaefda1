"""Walking between LoRAs and along attributes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.baselines import Neighbours
from hyperlora_jax.hypernet.editing import (
    Space,
    edit,
    interpolate,
    load_directions,
    save_directions,
)
from hyperlora_jax.hypernet.model import Hypernetwork
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec

SPEC = LoraSpec((LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", 6, 8, 2, "linear"),))


class MeanColour:
    name, embedding_dim, hash = "colour", 3, "c"

    def encode(self, images):
        pooled = jnp.asarray(images).mean(axis=(1, 2))
        return pooled, pooled[:, None]


@pytest.fixture(name="labelled", scope="module")
def _labelled():
    random = np.random.default_rng(0)
    shown = random.uniform(size=200) < 0.4
    axis = random.normal(size=SPEC.num_parameters)
    noise = random.normal(size=(200, 6)) @ random.normal(size=(6, SPEC.num_parameters))
    vectors = (noise + 3.0 * shown[:, None] * axis).astype(np.float32)
    return vectors, shown


def test_coordinates_are_whitened_and_invertible(labelled):
    vectors, _ = labelled
    space = Space.fit(vectors, SPEC)
    coordinates = space.coordinates(vectors)
    np.testing.assert_allclose(coordinates.std(axis=0, ddof=1), 1.0, atol=1e-2)
    np.testing.assert_allclose(space.vectors(coordinates), vectors, atol=1e-2)


def test_direction_turns_the_attribute_on(labelled, tmp_path):
    vectors, shown = labelled
    space = Space.fit(vectors[:150], SPEC)
    direction = space.direction(vectors[:150], shown[:150])
    # The classifier that made it, applied to LoRAs it has not seen.
    normal = space.coordinates(direction[None] + space.mean)[0]
    scores = space.coordinates(vectors) @ normal
    middle = (scores[shown].mean() + scores[~shown].mean()) / 2
    assert np.mean((scores > middle)[150:] == shown[150:]) > 0.9
    lora = vectorize.unflatten(jnp.asarray(vectors[150:][~shown[150:]]), SPEC)
    save_directions(tmp_path / "d.safetensors", {"hat": direction}, SPEC)
    directions = load_directions(tmp_path / "d.safetensors", SPEC)
    moved = vectorize.flatten(edit(lora, SPEC, directions, {"hat": 3.0}), SPEC)
    assert np.mean(space.coordinates(moved) @ normal > middle) > 0.9
    with pytest.raises(UserError, match="no direction 'hair', there are hat"):
        edit(lora, SPEC, directions, {"hair": 1.0})
    with pytest.raises(UserError, match="hat has 28 numbers"):
        load_directions(tmp_path / "d.safetensors", SPEC.with_rank(1))
    with pytest.raises(UserError, match="0 of 200 LoRAs show it"):
        space.direction(vectors, np.zeros(200, bool))


def test_interpolation_ends_at_both_subjects(labelled):
    vectors, _ = labelled
    embeddings = np.eye(3, dtype=np.float32)
    generator = Neighbours(SPEC, "raw", 3, temperature=0.5)
    constants = generator.fit(embeddings, vectors[:3])
    hyper = Hypernetwork(generator, {}, MeanColour(), {}, {"generator": "knn"}, constants)
    red, blue = (np.broadcast_to(row, (1, 4, 4, 3)).astype(np.float32) for row in embeddings[:2])
    key = jax.random.key(0)
    way = interpolate(hyper, key, red, blue, [0.0, 0.5, 1.0])
    assert factors.num_loras(way) == 3
    ends = hyper.generate(key, np.stack([red, blue]))
    for between, end in zip(jax.tree.leaves(way), jax.tree.leaves(ends), strict=True):
        np.testing.assert_allclose(between[0], end[0], atol=1e-5)
        np.testing.assert_allclose(between[2], end[1], atol=1e-5)
    with pytest.raises(UserError, match="expected the same"):
        interpolate(hyper, key, red, np.concatenate([blue, blue]), [0.5])
