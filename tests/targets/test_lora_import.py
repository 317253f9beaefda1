import json
import re

import damaged_files
import jax
import numpy as np
import pytest
from damaged_files import BASE, SPEC, good
from PIL import Image

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors, gauge, vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors
from hyperlora_jax.lora_files import load_lora, save_lora
from hyperlora_jax.targets import lora_fitting, lora_import, lora_sources
from hyperlora_jax.targets.lora_import import import_loras, read_identities
from hyperlora_jax.targets.lora_targets import open_lora_targets


def run(paths, out, spec=SPEC, **options):
    reading = {
        name: options.pop(name) for name in ("on_missing", "on_extra", "alpha") if name in options
    }
    reader = lora_sources.FileReader(spec, BASE, **reading)
    return import_loras(paths, out, reader, progress=False, **options)


def assert_same_deltas(vector, expected, spec=SPEC, rtol=1e-4):
    ours, theirs = (vectorize.unflatten(v, spec) for v in (vector, expected))
    for site in spec.sites:
        a, b = (factors.delta(site_factors(tree, site)) for tree in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def test_mixed_formats_become_one_dataset(tmp_path):
    vectors = {
        "anna": good(tmp_path / "in/anna.safetensors", 1),
        "deep/bert": good(tmp_path / "in/deep/bert.safetensors", 2, format="kohya"),
    }
    good(tmp_path / "in/carl/pytorch_lora_weights.safetensors", 3)
    vectors["doris"] = good(tmp_path / "in/doris", 4, format="peft")
    (tmp_path / "in/eva").mkdir()
    vectors["eva"] = good(tmp_path / "in/eva/unet", 5, format="peft")
    (tmp_path / "in/readme.txt").write_text("about these")
    report = run([tmp_path / "in"], tmp_path / "out")
    targets = open_lora_targets(tmp_path / "out", SPEC, BASE)
    assert report.imported == 5 and not report.rejected
    assert set(targets.ids) == {*vectors, "carl/pytorch_lora_weights"}
    for k, name in enumerate(targets.ids):
        if name in vectors:
            assert_same_deltas(targets[k].lora, vectors[name], rtol=1e-6)
    assert (tmp_path / "out/quarantine.jsonl").read_text() == ""
    assert targets.facts["import"]["imported"] == 5


def test_every_damage_is_listed_with_its_reason_and_the_rest_imported(tmp_path):
    for k in range(5):
        good(tmp_path / f"in/good {k}.safetensors", k)
    for name, (damage, _) in damaged_files.DAMAGES.items():
        path = tmp_path / f"in/bad {name}.safetensors"
        damage(path)
    report = run([tmp_path / "in"], tmp_path / "out")
    assert report.imported == 5
    rows = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    reasons = {row["id"].removeprefix("bad "): row["reason"] for row in rows}
    assert reasons.keys() == damaged_files.DAMAGES.keys() and len(reasons) >= 20
    for name, (_, expected) in damaged_files.DAMAGES.items():
        assert re.search(expected, reasons[name]), (name, reasons[name])
        assert str(tmp_path) not in reasons[name] and "unreadable" not in reasons[name]
    printed = "\n".join(report.lines())
    assert f"5 of {5 + len(reasons)} LoRAs imported" in printed and "in quarantine" in printed


@pytest.mark.slow
def test_five_thousand_files_of_which_five_hundred_are_damaged(tmp_path):
    damages = list(damaged_files.DAMAGES.items())
    for k in range(5000):
        path = tmp_path / f"in/{k % 50:02d}/{k:04d}.safetensors"
        if k % 10 == 7:
            damages[k // 10 % len(damages)][1][0](path)
        else:
            good(path, k)
    report = run([tmp_path / "in"], tmp_path / "out", num_workers=2)
    assert report.imported == 4500 and len(report.rejected) == 500
    for row in report.rejected:
        expected = damages[int(row.id[3:]) // 10 % len(damages)][1][1]
        assert re.search(expected, row.reason), row


def test_processes_give_the_same(tmp_path):
    for k in range(6):
        good(tmp_path / f"in/{k}.safetensors", k)
    (tmp_path / "in/bad.safetensors").write_bytes(b"")
    files = lora_sources.find_lora_files([tmp_path / "in"])
    reader = lora_sources.FileReader(SPEC)
    alone = list(lora_sources.read_files(files, reader))
    together = list(lora_sources.read_files(files, reader, num_workers=2))
    assert [row.id for row in alone] == [row.id for row in together]
    assert isinstance(together[-1], lora_sources.Rejected)
    for a, b in zip(alone[:-1], together[:-1], strict=True):
        np.testing.assert_array_equal(a.fitted.vector, b.fitted.vector)


def test_ranks_are_cut_by_energy_or_padded(tmp_path):
    wide, narrow = SPEC.with_rank(5), SPEC.with_rank(1)
    vector = good(tmp_path / "in/wide.safetensors", 1, wide)
    small = good(tmp_path / "in/narrow.safetensors", 2, narrow)
    report = run([tmp_path / "in"], tmp_path / "out")
    targets = open_lora_targets(tmp_path / "out")
    by_id = dict(zip(targets.ids, targets.matrix(), strict=True))
    expected, _ = gauge.truncate(vectorize.unflatten(vector, wide), wide, 2)
    assert_same_deltas(by_id["wide"], np.asarray(vectorize.flatten(expected, SPEC)))
    padded = gauge.pad_rank(vectorize.unflatten(small, narrow), 2)
    assert_same_deltas(by_id["narrow"], np.asarray(vectorize.flatten(padded, SPEC)))
    assert (report.truncated, report.padded) == (1, 1)
    whole = vectorize.unflatten(vector, wide)
    kept = vectorize.unflatten(by_id["wide"], SPEC)
    energy = lost = 0.0
    for site in SPEC.sites:
        delta = np.asarray(factors.delta(site_factors(whole, site)))
        energy += np.square(delta).sum()
        lost += np.square(delta - factors.delta(site_factors(kept, site))).sum()
    np.testing.assert_allclose(report.lost["wide"], lost / energy, rtol=1e-4)
    assert report.lost["narrow"] == 0
    assert "1 of 2 LoRAs lost energy" in "\n".join(report.lines())


def test_zero_components_are_dropped_without_touching_the_factors(tmp_path):
    vector = good(tmp_path / "in/a.safetensors", 1)
    lora, found = load_lora(tmp_path / "in/a.safetensors")
    padded = gauge.pad_rank(lora, 6)
    fitted = lora_fitting.fit_to_spec(
        {k: _numpy(v) for k, v in padded.items()}, found.with_rank(6), SPEC
    )
    assert fitted.lost == 0 and fitted.num_truncated == 0
    np.testing.assert_allclose(fitted.vector, lora_fitting.fit_to_spec(lora, found, SPEC).vector)
    assert_same_deltas(fitted.vector, vector, rtol=1e-6)


def _numpy(tree):
    return {k: _numpy(v) if isinstance(v, dict) else np.asarray(v) for k, v in tree.items()}


def test_missing_and_further_sites_by_option(tmp_path):
    part = LoraSpec(SPEC.sites[:2])
    vector = good(tmp_path / "in/a.safetensors", 1, part)
    report = run([tmp_path / "in"], tmp_path / "zero", on_missing="zero")
    targets = open_lora_targets(tmp_path / "zero")
    lora = vectorize.unflatten(targets[0].lora, SPEC)
    missing = site_factors(lora, SPEC.sites[2])
    assert report.incomplete == 1 and not missing["down"].any() and not missing["up"].any()
    good(tmp_path / "more/b.safetensors", 2)
    report = run([tmp_path / "more"], tmp_path / "drop", spec=part, on_extra="drop")
    assert report.dropped == 1 and 0 < report.lost["b"] < 1
    assert vector.size == part.num_parameters


def test_pictures_beside_the_files_become_references(tmp_path):
    for name in ("a", "b", "c"):
        good(tmp_path / f"in/{name}.safetensors", 1)
    Image.new("RGB", (10, 8), (200, 0, 0)).save(tmp_path / "in/a.png")
    Image.new("RGB", (10, 8)).save(tmp_path / "in/b.preview.png")
    (tmp_path / "in/c.png").write_bytes(b"broken")
    run([tmp_path / "in"], tmp_path / "out")
    targets = open_lora_targets(tmp_path / "out")
    given = {targets.ids[k]: len(targets[k].references) for k in range(3)}
    assert given == {"a": 1, "b": 1, "c": 0}


def test_an_adapter_folder_of_several_models_is_one_lora(tmp_path):
    """Not the part of the UNet alone under its name."""
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    both = LoraSpec((*SPEC.sites, LoraSite(path, 8, 8, 2)))
    lora = factors.init(jax.random.key(0), both)
    save_lora(tmp_path / "in" / "anna", lora, both, "peft")
    save_lora(tmp_path / "in" / "BERT.safetensors", lora, both)
    (tmp_path / "in" / "BERT.safetensors").rename(tmp_path / "in" / "BERT.SAFETENSORS")
    found = lora_sources.find_lora_files([tmp_path / "in"])
    assert [name for name, _ in found] == ["BERT", "anna"]
    assert lora_sources.find_lora_files([tmp_path / "in" / "anna"])[0][0] == "anna"
    assert len(load_lora(found[1][1])[1]) == len(both)


def test_equal_names_stay_apart(tmp_path):
    for root in ("one", "two"):
        good(tmp_path / root / "a.safetensors", 1)
    (tmp_path / "one/a.pt").write_bytes(b"x")
    names = [name for name, _ in lora_sources.find_lora_files([tmp_path / "one", tmp_path / "two"])]
    assert names == ["a.pt", "a.safetensors", "a.safetensors 2"]
    report = run([tmp_path / "one"], tmp_path / "out")
    reasons = [row.reason for row in report.rejected]
    assert reasons == ["the same LoRA as a.safetensors beside it"]


@pytest.fixture(scope="module")
def matrix():
    return np.random.default_rng(0).normal(size=(70, SPEC.num_parameters)).astype(np.float32)


@pytest.mark.parametrize("kind", ["npy", "safetensors", "pt", "bf16"])
def test_matrix_rows_are_scaled_by_alpha_over_rank(matrix, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_sources, "MAPPED_BYTES", 40 * 4 * SPEC.num_parameters)
    path = tmp_path / f"all_weights.{kind}"
    tolerance = 1e-6
    if kind == "npy":
        np.save(path, matrix)
    elif kind == "safetensors":
        lora_sources.safetensors_io.write(path, {"weights": matrix}, {})
    else:
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(matrix)
        path = tmp_path / "all_weights.pt"
        torch.save(tensor.bfloat16() if kind == "bf16" else tensor, path)
        tolerance = 1e-2 if kind == "bf16" else tolerance
    assert lora_sources.is_matrix(path)
    identities = {f"{k:06d}": f"person {k // 2}" for k in range(70)}
    report = run([path], tmp_path / "out", alpha=27.0, identities=identities)
    targets = open_lora_targets(tmp_path / "out")
    assert report.imported == len(targets) == 70 and set(targets.identities) == {
        f"person {k}" for k in range(35)
    }
    rows = {name: k for k, name in enumerate(targets.ids)}
    got = vectorize.unflatten(targets[rows["000041"]].lora, SPEC)
    stored = vectorize.unflatten(matrix[41], SPEC)
    for site in SPEC.sites:
        a, b = site_factors(got, site), site_factors(stored, site)
        np.testing.assert_allclose(a["down"], b["down"], rtol=tolerance)
        np.testing.assert_allclose(a["up"], b["up"] * 13.5, rtol=tolerance)


def test_rows_of_several_matrices_are_told_apart(matrix, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "m.npy", matrix[:3])
    good(tmp_path / "000001.safetensors", 1)
    paths = [tmp_path / "a/m.npy", tmp_path / "b/m.npy", tmp_path / "000001.safetensors"]
    people = {"m.npy/000002": "Anna", "000001": "Bert"}
    report = run(paths, tmp_path / "out", identities=people | {"gone": "Carl"})
    assert report.imported == 7
    lacks, surplus = report.lines()[-2:]
    assert "identities: 5 (first 'm.npy 2/000000'), each is its own" in lacks
    assert "without a LoRA: 1 (first 'gone')" in surplus
    targets = open_lora_targets(tmp_path / "out")
    ids = {f"{name}/{k:06d}" for name in ("m.npy", "m.npy 2") for k in range(3)}
    assert set(targets.ids) == {"000001", *ids} and {"Anna", "Bert"} <= set(targets.identities)


def test_bad_rows_go_to_quarantine(matrix, tmp_path):
    spoilt = matrix.copy()
    spoilt[3, 5] = np.nan
    np.save(tmp_path / "m.npy", spoilt)
    report = run([tmp_path / "m.npy"], tmp_path / "out")
    assert report.imported == 69
    (row,) = report.rejected
    assert (row.id, row.reason) == ("000003", "NaN or Inf in the row")


def test_identity_tables(tmp_path):
    (tmp_path / "t.csv").write_text("id,identity\n7,Anna\nbert/1,Bert\n")
    (tmp_path / "t.json").write_text('{"7": "Anna", "bert/1": "Bert"}')
    for name in ("t.csv", "t.json"):
        assert read_identities(tmp_path / name) == {"000007": "Anna", "bert/1": "Bert"}


def test_wrong_use_is_named(matrix, tmp_path):
    def refuse(match, function, *arguments, **options):
        with pytest.raises(UserError, match=match):
            function(*arguments, **options)

    refuse("nowhere: no such file or folder", run, [tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refuse("empty: no LoRA files, expected", run, [tmp_path / "empty"], tmp_path / "out")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    refuse("none of 1 LoRAs can be imported, first .*empty file", run,
           [tmp_path / "bad.safetensors"], tmp_path / "out")  # fmt: skip
    np.save(tmp_path / "m.npy", matrix[:, :-1])
    refuse(r"matrix of shape \[70, \d+\], the spec expects \[n, ", run,
           [tmp_path / "m.npy"], tmp_path / "out")  # fmt: skip
    (tmp_path / "n.npy").write_bytes(b"hello")
    refuse("no readable .npy matrix", run, [tmp_path / "n.npy"], tmp_path / "out")
    refuse("expected a matrix as .npy", lora_sources.open_matrix, tmp_path / "m.txt", 3)
    assert not (tmp_path / "out").exists()
    (tmp_path / "t.csv").write_text("name,who\n")
    refuse("expected id and identity", read_identities, tmp_path / "t.csv")
    (tmp_path / "t.json").write_text("{")
    refuse("no valid JSON", read_identities, tmp_path / "t.json")
    (tmp_path / "t.json").write_text("[]")
    refuse("expected a JSON object of id: identity", read_identities, tmp_path / "t.json")
    refuse("cannot read the identity table", read_identities, tmp_path / "gone.csv")


def test_a_hostile_pickle_is_not_executed(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="none of 1 LoRAs can be imported"):
        run([tmp_path / "evil.pt"], tmp_path / "out")
    with pytest.raises(UserError, match="holds no plain tensor"):
        lora_sources.open_matrix(tmp_path / "evil.pt", 3)
    assert not (tmp_path / "owned").exists()
    assert lora_import.QUARANTINE not in [p.name for p in tmp_path.iterdir()]
