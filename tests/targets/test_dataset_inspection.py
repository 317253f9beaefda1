import numpy as np
import pytest
from targets_fixture import SPEC, picture, subject

from hyperlora_jax.lora import factors, gauge, vectorize
from hyperlora_jax.lora.sites import LoraSpec, site_factors
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.targets import dataset_inspection as inspection
from hyperlora_jax.targets.lora_targets import open_lora_targets
from hyperlora_jax.targets.lora_targets_writer import write_lora_targets


def scaled(vector, factor):
    lora = factors.scale(vectorize.unflatten(vector, SPEC), factor)
    return np.asarray(vectorize.flatten(lora, SPEC))


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    given = [subject(k, split="train") for k in range(30)]
    other_gauge = gauge.canonical(vectorize.unflatten(given[4].lora, SPEC), SPEC, "svd")
    for k, vector in enumerate(
        [
            given[2].lora,
            scaled(given[3].lora, 2.5),
            scaled(given[5].lora, -1.0),
            np.asarray(vectorize.flatten(other_gauge, SPEC)),
            np.zeros_like(given[0].lora),
            scaled(given[6].lora + 0.1, 1e6),
        ]
    ):
        first = given[0]
        name = f"extra {k}"
        given.append(
            Subject(
                name,
                name,
                references=first.references,
                embeddings=first.embeddings,
                lora=vector,
                split="train",
            )
        )
    path = tmp_path_factory.mktemp("data") / "targets"
    return open_lora_targets(write_lora_targets(path, given, SPEC, ""))


def test_norms_and_singular_values_are_those_of_the_deltas(targets):
    vectors = targets.loras(range(5))
    lora = vectorize.unflatten(vectors, SPEC)
    measured = inspection.measure(targets, np.arange(5))
    for k, (site, a, b) in enumerate(inspection.site_matrices(vectors, SPEC)):
        delta = np.asarray(factors.delta(site_factors(lora, site))).reshape(5, -1)
        np.testing.assert_allclose(measured.norms[:, k], np.linalg.norm(delta, axis=1), rtol=1e-4)
        squares = inspection.squared_singular_values(a, b)
        matrices = np.asarray(factors.delta(site_factors(lora, site))).reshape(5, site.fan_in, -1)
        wanted = np.linalg.svd(matrices, compute_uv=False)[:, : site.rank]
        np.testing.assert_allclose(np.sqrt(squares), wanted, rtol=1e-3)
    assert abs(measured.component_energy.sum() - 1) < 1e-6


def test_duplicates_outliers_and_empty_ones_are_found(targets):
    report = inspection.inspect_targets(targets)
    found = {row["id"]: row for row in report["duplicates"]}
    assert found.keys() == {"extra 0", "extra 1", "extra 2", "extra 3"}
    assert found["extra 0"]["of"] == "subject 2/a" and found["extra 0"]["kind"] == "identical"
    assert abs(found["extra 1"]["factor"] - 2.5) < 1e-3 and found["extra 1"]["kind"] == "scaled"
    assert abs(found["extra 2"]["factor"] + 1) < 1e-3
    assert found["extra 3"]["of"] == "subject 4/a" and found["extra 3"]["kind"] == "identical"
    assert report["empty"] == ["extra 4"]
    assert [row["id"] for row in report["outliers"]] == ["extra 5"]
    lines = "\n".join(inspection.report_lines(report))
    assert "extra 1 = 2.5 × subject 3/a (scaled)" in lines and "outliers       1" in lines


def test_duplicates_across_blocks():
    random = np.random.default_rng(0)
    sketches = random.normal(size=(50, 64))
    sketches[40] = 3 * sketches[1]
    sketches[45] = sketches[40]
    norms = np.linalg.norm(sketches, axis=1)
    found = inspection.find_duplicates(sketches, norms, block=7)
    assert [(i, j) for i, j, _ in found] == [(1, 40), (1, 45)]


def test_explained_variance_of_a_plane():
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(20, 2)) @ random.normal(size=(2, 50))).astype(np.float32)
    shares = inspection.explained_variance(vectors)
    assert shares[0] < 0.999 and shares[1] > 0.9999


def test_limit_and_pictures_only(targets, tmp_path):
    assert inspection.inspect_targets(targets, limit=7)["measured"] == 7
    given = [subject(k, lora=False) for k in range(3)]
    path = write_lora_targets(tmp_path / "t", given, LoraSpec(()), "")
    pictures = open_lora_targets(path)
    report = inspection.inspect_targets(pictures)
    assert "delta_norm" not in report and report["pictures_of_first"] == [2, 1]
    sheet = inspection.contact_sheet(pictures, size=12)
    assert sheet.shape == (12, 96, 3)
    assert (sheet[:, :12] != 255).any() and (sheet[:, 36:] == 255).all()
    assert picture(0).shape == (12, 10, 3)
