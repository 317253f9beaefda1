import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.encoders.condition_encoders import load_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.pretrain import encoder_task
from hyperlora_jax.pretrain.encoder_task import EncoderLossWeights, info_nce
from hyperlora_jax.pretrain.render_bundle import (
    RenderBundle,
    neutral_view,
    pair_batches,
    render_bundle,
    view_batches,
)
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
    return render_bundle(Avatars(size=16), 24, 3, progress=False)


def test_bundle_round_trip(bundle, tmp_path):
    bundle.save(tmp_path / "b.npz")
    again = RenderBundle.load(tmp_path / "b.npz")
    np.testing.assert_array_equal(again.images, bundle.images)
    np.testing.assert_array_equal(again.view_labels, bundle.view_labels)
    assert again.view_parts == bundle.view_parts and again.facts == bundle.facts


def test_bundle_agrees_with_avatars(bundle):
    avatars = Avatars(size=16)
    person = avatars.identity("train", 5)
    np.testing.assert_array_equal(bundle.neutral[5], avatars.render(person, neutral_view(avatars)))
    view = avatars.view("train", 5 * 3 + 2)
    np.testing.assert_array_equal(bundle.images[5, 2], avatars.render(person, view))
    assert list(avatars.caption_parts(view).values()) == bundle.view_labels[5, 2].tolist()


def test_bad_bundles(bundle, tmp_path):
    (tmp_path / "x.npz").write_text("no")
    with pytest.raises(UserError, match="cannot be read"):
        RenderBundle.load(tmp_path / "x.npz")
    with pytest.raises(UserError, match="expected at least 100"):
        pair_batches(bundle, 100, 0)
    with pytest.raises(UserError, match="train identities"):
        render_bundle(Avatars(size=16), 10**7, 1)


def test_pairs_are_two_views_of_one_identity(bundle):
    batch = next(pair_batches(bundle, 8, 0))
    rows = [
        next(i for i in range(24) if (bundle.neutral[i] == neutral).all())
        for neutral in batch["neutral"]
    ]
    assert len(set(rows)) == 8
    for k, i in enumerate(rows):
        seen = [
            [v for v in range(3) if (bundle.images[i, v] == batch[side][k]).all()]
            for side in ("first", "second")
        ]
        assert seen[0] and seen[1] and seen[0] != seen[1]


def test_batches_resume(bundle):
    batches = pair_batches(bundle, 8, seed=3)
    next(batches)
    state, expected = batches.get_state(), next(batches)
    fresh = pair_batches(bundle, 8, seed=3)
    fresh.set_state(state)
    np.testing.assert_array_equal(next(fresh)["first"], expected["first"])


@pytest.mark.parametrize("make", [pair_batches, view_batches])
def test_hosts_share_a_batch(bundle, make):
    own = np.array([0, 1, 6, 7])
    whole, part = next(make(bundle, 8, 3)), next(make(bundle, 8, 3, own))
    for name, expected in whole.items():
        np.testing.assert_array_equal(part[name], expected[own], err_msg=name)


def test_info_nce_known_answers():
    unit = jnp.eye(4)
    loss, top1 = info_nce(unit, unit, 0.01)
    np.testing.assert_allclose(loss, 0.0, atol=1e-5)
    np.testing.assert_array_equal(top1, 1.0)
    loss, _ = info_nce(jnp.ones((4, 4)) / 2, jnp.ones((4, 4)) / 2, 0.1)
    np.testing.assert_allclose(loss, np.log(4.0), rtol=1e-5)
    _, top1 = info_nce(unit, unit[::-1], 0.1)
    np.testing.assert_array_equal(top1, 0.0)


def test_training_lowers_every_loss_and_exports(bundle, tmp_path):
    task = encoder_task.make_task(
        bundle,
        batch_size=16,
        encoder=ENCODER,
        weights={"noise": 0.0},
        projection_dim=16,
        decoder_width=16,
    )
    state = fit(
        task,
        Plan(20, {"learning_rate": 3e-3}, log_every_steps=1),
        workdir=tmp_path / "run",
        mesh=make_mesh(devices=jax.devices()[:1]),
        progress=False,
    )
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    assert last["contrast"] < 0.8 * first["contrast"] and last["pair_top1"] > 0.3
    assert last["picture_error"] < 0.75 * first["picture_error"]
    assert last["part_accuracy"] > first["part_accuracy"]

    encoder_task.export_encoder(tmp_path / "e", state.params, bundle, encoder=ENCODER)
    encoder = load_encoder(tmp_path / "e")
    images = bundle.images[:4, 0].astype(np.float32) / 255.0
    pooled, _ = encoder.module.apply({"params": state.params["encoder"]}, images)
    np.testing.assert_allclose(encoder.encode(images)[0], pooled, atol=0.05)
    assert encoder.facts["data"]["style"] == "pixel-art"


def test_channel_orders():
    orders = jax.jit(encoder_task.channel_orders, static_argnums=1)
    order, changed = jax.device_get(orders(jax.random.key(0), 64, jnp.float32(0.5)))
    assert set(map(tuple, np.sort(order, axis=1).tolist())) == {(0, 1, 2)}
    assert 0.3 < float(changed.mean()) < 0.7
    kept = order[changed == 0.0]
    np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(3), kept.shape))
    _, changed = orders(jax.random.key(0), 64, jnp.float32(0.0))
    assert float(changed.max()) == 0.0


def test_heads_are_optional(bundle):
    weights = EncoderLossWeights(parts=0.0)
    module = encoder_task.make_network(bundle, ENCODER, weights)
    assert module.part_sizes == ()
