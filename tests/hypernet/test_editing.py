"""Walking between LoRAs and along attributes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.baselines import Neighbours
from hyperlora_jax.hypernet.editing import (
    edit,
    fit_directions,
    interpolate,
    load_directions,
    save_directions,
)
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import factors, losses, vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors, tree_from_sites, validate

SPEC = LoraSpec((LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", 6, 8, 2, "linear"),))


class MeanColour:
    name, embedding_dim, hash = "colour", 3, "c"
    image_size, num_tokens = (8, 8), 1

    def encode(self, images):
        pooled = jnp.asarray(images).mean(axis=(1, 2))
        return pooled, pooled[:, None]


@pytest.fixture(name="labelled", scope="module")
def _labelled():
    """LoRAs of rank 2 and two attributes that often come together, a rank-1 delta each: factors in
    another basis for every LoRA, so that no classifier of raw numbers could tell."""
    random = np.random.default_rng(0)
    hat = random.uniform(size=400) < 0.4
    tie = np.where(random.uniform(size=400) < 0.3, ~hat, hat)
    down, up = random.normal(size=(2, 6, 1)), random.normal(size=(2, 1, 8))
    basis = np.linalg.qr(random.normal(size=(400, 2, 2)))[0]
    amounts = np.stack([hat, tie], 1)[:, None]  # [t, 1, 2]
    downs = amounts * np.concatenate(list(down), 1) @ basis
    ups = np.swapaxes(basis, 1, 2) @ np.concatenate(list(up), 0)
    name = SPEC.sites[0].path
    loras = tree_from_sites({name: {"down": np.float32(downs), "up": np.float32(ups)}})
    vectors = np.asarray(vectorize.flatten(loras, SPEC))
    return vectors, {"hat": hat, "tie": tie}, down @ up


def delta_of(lora):
    return np.asarray(factors.delta(site_factors(lora, SPEC.sites[0])))


def test_directions_are_what_each_attribute_adds(labelled, tmp_path):
    vectors, labels, added = labelled
    save_directions(tmp_path / "d.safetensors", fit_directions(vectors, SPEC, labels))
    directions = load_directions(tmp_path / "d.safetensors", SPEC)
    neither = vectorize.unflatten(jnp.asarray(vectors[[3, 7]]), SPEC)
    for name, wanted in zip(labels, added, strict=True):
        moved, spec = edit(neither, directions, {name: 0.5})
        validate(moved, spec)
        assert spec.max_rank == 4
        change = delta_of(moved) - delta_of(neither)
        norms = np.sqrt(losses.delta_inner(neither, neither)) / directions.size
        np.testing.assert_allclose(change, 0.5 * norms[:, None, None] * wanted, atol=1e-3)
    one, spec = edit(factors.index(neither, 0), directions, {"hat": 1.0, "tie": -1.0})
    validate(one, spec)
    assert spec.max_rank == 6
    with pytest.raises(UserError, match="no direction 'hair', there are hat, tie"):
        edit(neither, directions, {"hair": 1.0})


def test_directions_refused(labelled, tmp_path):
    vectors, labels, _ = labelled
    with pytest.raises(UserError, match="attribute hat: 0 of 400 LoRAs show it"):
        fit_directions(vectors, SPEC, {"hat": np.zeros(400, bool)})
    with pytest.raises(UserError, match="hat, bare: one follows from the others"):
        fit_directions(vectors, SPEC, {"hat": labels["hat"], "bare": ~labels["hat"]})
    with pytest.raises(UserError, match="deltas of all 400 LoRAs are zero"):
        fit_directions(np.zeros_like(vectors), SPEC, labels)
    file = tmp_path / "d.safetensors"
    save_directions(file, fit_directions(vectors, SPEC, labels))
    with pytest.raises(UserError, match=r"\(1 sites, rank 2\), the checkpoint's is .* rank 1\)"):
        load_directions(file, SPEC.with_rank(1))
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"d\.safetensors: header of .* cut off"):
        load_directions(file, SPEC)
    save_file({"a": vectors[0]}, file)
    with pytest.raises(UserError, match="is no file of `hyperlora directions`"):
        load_directions(file, SPEC)


def test_interpolation_ends_at_both_subjects(labelled):
    vectors, *_ = labelled
    embeddings = np.eye(3, dtype=np.float32)
    generator = Neighbours(SPEC, "raw", 3, temperature=0.5)
    constants = generator.fit(embeddings, vectors[:3])
    hyper = Hypernetwork(generator, {}, MeanColour(), {}, {"generator": "knn"}, constants)
    red, blue = (np.broadcast_to(row, (1, 8, 8, 3)).astype(np.float32) for row in embeddings[:2])
    key = jax.random.key(0)
    way = interpolate(hyper, key, red, blue, [0.0, 0.5, 1.0])
    assert factors.num_loras(way) == 3
    ends = hyper.generate(key, np.stack([red, blue]))
    for between, end in zip(jax.tree.leaves(way), jax.tree.leaves(ends), strict=True):
        np.testing.assert_allclose(between[0], end[0], atol=1e-5)
        np.testing.assert_allclose(between[2], end[1], atol=1e-5)
    with pytest.raises(UserError, match="expected the same"):
        interpolate(hyper, key, red, np.concatenate([blue, blue]), [0.5])
