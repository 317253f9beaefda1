import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.pretrain import probe_task
from hyperlora_jax.pretrain.probe_task import Augmentation, augment
from hyperlora_jax.pretrain.render_bundle import render_bundle, view_batches
from hyperlora_jax.train.loop import Plan, fit
from hyperlora_jax.worlds.avatars import Avatars

ENCODER = {
    "image_size": 16,
    "widths": (8, 16),
    "embedding_dim": 64,
    "pool_channels": 8,
    "groups": 4,
}


@pytest.fixture(scope="module")
def bundle():
    return render_bundle(Avatars(size=16), 8, 4, progress=False)


def test_augmentation():
    images = jnp.asarray(np.random.default_rng(0).random((6, 8, 8, 3)), jnp.float32)
    key = jax.random.key(0)
    np.testing.assert_allclose(augment(images, key, Augmentation(0.0, 0.0, 0.0)), images, atol=1e-6)
    disturbed = augment(images, key, Augmentation())
    assert 0.01 < float(jnp.abs(disturbed - images).mean()) < 0.3
    flat = jnp.full((2, 8, 8, 3), 0.4)
    np.testing.assert_allclose(augment(flat, key, Augmentation(0.0, 1.0, 0.0)), 0.4, atol=1e-6)


def test_batches_pair_pictures_with_their_labels(bundle):
    batches = view_batches(bundle, 5, 0)
    batch = next(batches)
    for image, labels in zip(batch["images"], batch["labels"], strict=True):
        i, v = np.argwhere((bundle.images == image).all(axis=(2, 3, 4)))[0]
        np.testing.assert_array_equal(bundle.view_labels[i, v], labels)
    state, expected = batches.get_state(), next(batches)
    batches.set_state(state)
    np.testing.assert_array_equal(next(batches)["labels"], expected["labels"])


def test_learns(bundle, tmp_path):
    task = probe_task.make_task(bundle, batch_size=16, encoder=ENCODER)
    state = fit(
        task,
        Plan(20, {"learning_rate": 3e-3}, log_every_steps=1),
        workdir=tmp_path / "run",
        mesh=make_mesh(devices=jax.devices()[:1]),
        progress=False,
    )
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    probe_task.export_probe(tmp_path / "probe", state.params, bundle, encoder=ENCODER)
    config = json.loads((tmp_path / "probe" / "config.json").read_text())
    assert [part for part, _ in config["parts"]] == list(bundle.view_parts)
