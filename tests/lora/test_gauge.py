import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.lora import factors, gauge
from hyperlora_jax.lora.sites import site_factors, validate
from tests.lora.test_factors import assert_close, deltas


@pytest.mark.parametrize("num", [None, 3])
@pytest.mark.parametrize("kind", ["raw", "svd", "procrustes"])
def test_a_gauge_keeps_deltas_and_is_idempotent(spec, random_lora, num, kind):
    lora, reference = random_lora(num), random_lora(None, 9)
    once = gauge.canonical(lora, spec, kind, reference)
    validate(once, spec)
    assert_close(deltas(once, spec), deltas(lora, spec), 1e-4)
    assert_close(gauge.canonical(once, spec, kind, reference), once, 1e-4)


@pytest.mark.parametrize("kind", ["svd", "procrustes"])
def test_the_canonical_form_does_not_see_the_gauge(spec, random_lora, kind):
    lora, reference = random_lora(), random_lora(None, 9)

    def turned(pair):
        rank = pair["up"].shape[0]
        mix = np.eye(rank) + 0.3 * np.random.default_rng(5).standard_normal((rank, rank))
        return {"down": pair["down"] @ mix, "up": np.linalg.inv(mix) @ pair["up"]}

    other = jax.tree.map(turned, lora, is_leaf=factors.is_site)
    a, b = (gauge.canonical(tree, spec, kind, reference) for tree in (lora, other))
    assert_close(a, b, 2e-3)


def test_svd_form_is_balanced_ordered_and_signed(spec, random_lora):
    lora = gauge.canonical(random_lora(), spec, "svd")
    for site in spec:
        pair = site_factors(lora, site)
        down = np.asarray(pair["down"]).reshape(site.fan_in, site.rank)
        up = np.asarray(pair["up"])
        np.testing.assert_allclose(down.T @ down, up @ up.T, atol=1e-4)
        norms = np.linalg.norm(up, axis=1)
        assert (np.diff(norms) <= 1e-5).all()
        assert all(row[np.abs(row).argmax()] > 0 for row in up)
        matrix = np.asarray(deltas(lora, spec)[site.path]).reshape(-1, site.out_features)
        wanted = np.linalg.svd(matrix, compute_uv=False)[: site.rank]
        np.testing.assert_allclose(norms**2, wanted, atol=1e-4)


def test_signs_follow_the_reference(spec, random_lora):
    lora = gauge.canonical(random_lora(), spec, "svd")
    flipped = jax.tree.map(lambda leaf: -leaf, lora)
    assert_close(gauge.canonical(lora, spec, "svd", flipped), flipped, 1e-4)


def test_procrustes_undoes_a_rotation(spec, random_lora):
    reference = gauge.canonical(random_lora(), spec, "svd")

    def turned(pair):
        rank = pair["up"].shape[0]
        turn, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((rank, rank)))
        return {"down": pair["down"] @ turn, "up": turn.T @ pair["up"]}

    other = jax.tree.map(turned, reference, is_leaf=factors.is_site)
    assert_close(gauge.canonical(other, spec, "procrustes", reference), reference, 1e-4)


@pytest.mark.parametrize("num", [None, 2])
def test_truncation_is_the_best_of_its_rank(spec, random_lora, num):
    lora = random_lora(num)
    cut, cut_spec = gauge.truncate(lora, spec, 1)
    validate(cut, cut_spec)
    for site in spec:
        full = np.asarray(factors.delta(site_factors(lora, site)), np.float64)
        best = full.reshape(*full.shape[: 0 if num is None else 1], -1, site.out_features)
        left, sigma, right = np.linalg.svd(best, full_matrices=False)
        wanted = left[..., :1] * sigma[..., None, :1] @ right[..., :1, :]
        got = np.asarray(factors.delta(site_factors(cut, site))).reshape(wanted.shape)
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    wide, wide_spec = gauge.truncate(lora, spec, 8)
    validate(wide, wide_spec)
    assert_close(deltas(wide, spec), deltas(lora, spec), 1e-4)


@pytest.mark.parametrize("num", [None, 2])
def test_padding_adds_nothing(spec, random_lora, num):
    lora = random_lora(num)
    padded = gauge.pad_rank(lora, 5)
    validate(padded, spec.with_rank(5))
    assert_close(deltas(padded, spec), deltas(lora, spec))
    with pytest.raises(ValueError, match="above 2"):
        gauge.pad_rank(lora, 2)


def test_a_zero_lora_stays_zero_and_finite(spec):
    for kind in ("svd", "procrustes"):
        lora = gauge.canonical(factors.zeros(spec), spec, kind, factors.zeros(spec))
        assert jax.tree.all(jax.tree.map(lambda leaf: bool((leaf == 0).all()), lora))


def test_wrong_gauges_are_refused(spec, random_lora):
    with pytest.raises(ValueError, match="needs a reference"):
        gauge.canonical(random_lora(), spec, "procrustes")


def test_it_traces(spec, random_lora):
    lora = jax.tree.map(jnp.asarray, random_lora(2))
    traced = jax.jit(gauge.canonical, static_argnums=(1, 2))(lora, spec, "svd")
    assert_close(traced, gauge.canonical(lora, spec, "svd"), 1e-4)
