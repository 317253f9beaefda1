import jax
import numpy as np
import pytest

from hyperlora_jax.evaluate.audits.weight_errors import sites, spectrum, weight_errors

RANDOM = np.random.default_rng(0)


def lora(count=4, rank=2):
    def pair(width, out):
        return {
            "down": RANDOM.standard_normal((count, width, rank)).astype(np.float32),
            "up": RANDOM.standard_normal((count, rank, out)).astype(np.float32),
        }

    return {"down_0": {"to_q": pair(6, 5), "to_v": pair(6, 4)}}


TARGET = lora()


def scaled(factor, path=None):
    def change(where, leaf):
        names = [key.key for key in where]
        return leaf * factor if names[-1] == "up" and path in (None, names[-2]) else leaf

    return jax.tree_util.tree_map_with_path(change, TARGET)


def test_equal_loras_in_any_gauge():
    turned = jax.tree.map(lambda x: x, TARGET)
    turned["down_0"]["to_q"] = {
        "down": TARGET["down_0"]["to_q"]["down"] * 4.0,
        "up": TARGET["down_0"]["to_q"]["up"] / 4.0,
    }
    found = weight_errors(turned, TARGET)
    np.testing.assert_allclose(found.relative_error, 0.0, atol=1e-3)
    np.testing.assert_allclose(found.cosine, 1.0, atol=1e-5)


def test_nothing_and_half():
    np.testing.assert_allclose(weight_errors(scaled(0.0), TARGET).relative_error, 1.0, atol=1e-5)
    half = weight_errors(scaled(0.5), TARGET)
    np.testing.assert_allclose(half.relative_error, 0.5, atol=1e-4)
    np.testing.assert_allclose(half.scale, 2.0, rtol=1e-4)


def test_sites_apart():
    found = weight_errors(scaled(-1.0, "to_v"), TARGET)
    np.testing.assert_allclose(found.site_error["down_0/to_q"], 0.0, atol=1e-3)
    np.testing.assert_allclose(found.site_error["down_0/to_v"], 2.0, atol=1e-3)
    np.testing.assert_allclose(found.site_cosine["down_0/to_v"], -1.0, atol=1e-4)
    assert found.to_json()["relative_error"]["n"] == 4


def test_spectrum_is_that_of_the_delta():
    for path, values in spectrum(TARGET).items():
        pair = sites(TARGET)[path]
        dense = np.linalg.svd(pair["down"] @ pair["up"], compute_uv=False)[:, :2]
        np.testing.assert_allclose(values, dense, rtol=1e-4)


def test_misuse():
    with pytest.raises(ValueError, match="not the same identities"):
        weight_errors(lora(3), TARGET)
