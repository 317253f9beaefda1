import jax
import numpy as np
import pytest

from hyperlora_jax.evaluate.audits import memorisation
from hyperlora_jax.evaluate.audits.memorisation import audit_loras, delta_gram, image_memorisation

SITES = (("a", 12, 9), ("b", 7, 10))


def batch(down, up):
    return {"block": {site[0]: {"down": down[i], "up": up[i]} for i, site in enumerate(SITES)}}


def members(count, seed, rank=2):
    """LoRAs as fits are: one shared part, an identity part from a few causes, a fit's noise."""
    random = np.random.default_rng(seed)
    causes = np.random.default_rng(99)
    downs, ups = [], []
    traits = random.standard_normal((count, 4))
    for _, width, out in SITES:
        shared, mixing = causes.standard_normal((width, rank)), causes.standard_normal((4, rank))
        ups.append(
            (traits @ mixing)[:, :, None] * causes.standard_normal((rank, out))
            + 0.8 * random.standard_normal((count, rank, out))
        )
        downs.append(shared + 0.1 * random.standard_normal((count, width, rank)))
    return batch([d.astype(np.float32) for d in downs], [u.astype(np.float32) for u in ups])


def deltas(lora):
    flat = [
        np.einsum("lir,lro->lio", pair["down"], pair["up"]).reshape(len(pair["up"]), -1)
        for pair in lora["block"].values()
    ]
    return np.concatenate(flat, axis=1)


@pytest.fixture(scope="module")
def training():
    return members(90, 0)


def disturbed(lora, noise):
    random = np.random.default_rng(5)
    return jax.tree.map(
        lambda x: np.float32(x[:30] + noise * x.std() * random.standard_normal(x[:30].shape)), lora
    )


def test_gram_equals_dense_deltas(training):
    other = members(7, 1)
    expected = deltas(other) @ deltas(training).T
    np.testing.assert_allclose(delta_gram(other, training), expected, rtol=2e-4, atol=1e-2)


def test_centring_subtracts_the_training_mean(training):
    other = members(5, 1)
    mean = deltas(training).mean(axis=0)
    ours, theirs = deltas(other) - mean, deltas(training) - mean
    found = memorisation.centred_products(memorisation.delta_products(other, training))
    for ours_found, expected in (
        (found.across, ours @ theirs.T),
        (found.training, theirs @ theirs.T),
        (found.generated, np.square(ours).sum(axis=1)),
    ):
        np.testing.assert_allclose(ours_found, expected, rtol=1e-3, atol=0.1)


def test_projection_on_all_components_changes_nothing(training):
    other = members(5, 1)
    centred = memorisation.centred_products(memorisation.delta_products(other, training))
    projected = memorisation.projected_products(centred, 90)
    np.testing.assert_allclose(projected.across, centred.across, rtol=1e-3, atol=0.1)


def test_new_members_pass(training):
    for found in audit_loras(members(30, 7), training).values():
        assert found.passed and 0.7 < found.median_ratio < 1.6
        assert found.share_below_first_percentile < 0.2


def test_memorising_generator_fails(training):
    for noise in (0.0, 0.05):
        for found in audit_loras(disturbed(training, noise), training).values():
            assert not found.passed and found.median_ratio < 0.2
            assert found.share_below_first_percentile > 0.9 and found.ks_p < 1e-6


def test_json_is_numbers(training):
    found = audit_loras(members(6, 7), training)["delta"].to_json()
    assert found["num_generated"] == 6 and found["num_training"] == 90
    assert "nearest" not in found and isinstance(found["passed"], bool)


def test_too_few():
    with pytest.raises(ValueError, match="at least 3"):
        memorisation.audit(memorisation.vector_products(np.eye(2), np.eye(2)))


def test_pictures_of_training_identities_are_noticed():
    random = np.random.default_rng(0)
    exact = random.random((3, 2, 8, 8, 3))
    trained = random.random((3, 2, 5, 8, 8, 3))
    honest = image_memorisation(exact + 0.01, exact, trained)
    assert honest["nearer_to_training"] == 0.0 and honest["distance_ratio"] < 0.1
    replay = image_memorisation(trained[:, :, 3], exact, trained)
    assert replay["nearer_to_training"] == 1.0 and replay["distance_ratio"] > 10
    assert honest["exact_nearest"] == pytest.approx(1 / 6, rel=0.3)
