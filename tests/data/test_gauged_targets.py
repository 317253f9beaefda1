import numpy as np
import pytest
from targets_fixture import SPEC, subject

from hyperlora_jax.data import gauged_targets
from hyperlora_jax.data.gauged_targets import read_in_gauge
from hyperlora_jax.data.lora_targets import open_lora_targets
from hyperlora_jax.data.lora_targets_writer import write_lora_targets
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import site_factors


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    splits = ["train"] * 40 + ["test"] * 5
    given = [subject(k, split=split) for k, split in enumerate(splits)]
    path = tmp_path_factory.mktemp("data") / "targets"
    return open_lora_targets(write_lora_targets(path, given, SPEC, ""))


@pytest.mark.parametrize("kind", ["raw", "svd", "procrustes"])
def test_deltas_stay_and_statistics_are_those_of_the_gauge(targets, kind, tmp_path):
    gauged = read_in_gauge(targets, kind)
    raw, turned = (vectorize.unflatten(v, SPEC) for v in (targets.matrix(), gauged.vectors))
    for site in SPEC.sites:
        a, b = (factors.delta(site_factors(tree, site)) for tree in (raw, turned))
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())
    np.testing.assert_allclose(gauged.whitening.mean, gauged.vectors[:40].mean(0), atol=1e-5)
    assert (kind == "raw") == np.array_equal(gauged.vectors, targets.matrix())
    cached = read_in_gauge(targets, kind, tmp_path / "cache")
    np.testing.assert_array_equal(cached.vectors, gauged.vectors)
    assert isinstance(cached.vectors, np.memmap) and cached.facts() == gauged.facts()
    (path,) = (tmp_path / "cache").iterdir()
    before = path.stat().st_mtime_ns
    read_in_gauge(targets, kind, tmp_path / "cache")
    assert path.stat().st_mtime_ns == before


def test_svd_signs_agree_with_the_training_mean(targets):
    gauged = read_in_gauge(targets, "svd")
    reference = vectorize.unflatten(gauged.reference, SPEC)
    lora = vectorize.unflatten(gauged.vectors, SPEC)
    site = SPEC.sites[0]
    ours, mean = site_factors(lora, site), site_factors(reference, site)
    inner = np.einsum("lir,ir->lr", ours["down"], mean["down"])
    inner += np.einsum("lro,ro->lr", ours["up"], mean["up"])
    assert (inner >= -1e-5).all()


def test_facts_are_those_of_the_dataset_and_not_of_this_machine_s_rounding(
    targets, tmp_path, monkeypatch
):
    facts = {kind: read_in_gauge(targets, kind).facts() for kind in ("raw", "svd", "procrustes")}
    exact = gauged_targets.gauge_reference
    monkeypatch.setattr(
        gauged_targets,
        "gauge_reference",
        lambda *a: None if exact(*a) is None else exact(*a) + 1e-7,
    )
    for kind, expected in facts.items():
        assert read_in_gauge(targets, kind).facts() == expected
    other = write_lora_targets(tmp_path / "o", [subject(k) for k in range(3)], SPEC, "b" * 64)
    assert read_in_gauge(open_lora_targets(other), "svd").facts() != facts["svd"]


def test_wrong_gauge_and_cache_are_named(targets, tmp_path):
    with pytest.raises(UserError, match="gauge is 'qr', expected one of raw, svd, procrustes"):
        read_in_gauge(targets, "qr")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write the cache of vectors"):
        read_in_gauge(targets, "raw", tmp_path / "file")
