import json

import make_results
import pytest
import results_page

from hyperlora_jax.errors import UserError


def estimate(mean):
    return {"mean": mean, "stderr": 0.01, "n": 8}


def difference(mean):
    return {**estimate(mean), "z": mean / 0.01, "p": 0.001}


METRICS = {
    "identity_top1": {"exact": estimate(1.0), "generated": estimate(0.6), "base": estimate(0.03)},
    "image_error": {"exact": estimate(0.0), "generated": estimate(0.01), "base": estimate(0.05)},
    "caption_accuracy": {n: estimate(0.9) for n in ("exact", "generated", "base")},
    "diversity": {n: estimate(1.0) for n in ("exact", "generated", "base")},
    "paired": {
        "generated": 0.6,
        "conventional": 0.7,
        "ratio": 0.857,
        "ratio_stderr": 0.04,
        "n": 8,
    },
    "torch_parity": {"max_abs_diff": 1e-5, "unexpected_keys": 0, "missing_keys": 0},
    "seconds": {"train": 300.0, "generate_one_lora": 0.01, "fit_one_lora": 20.0},
    "failures": {"generated": 0},
    "strength": {"generated": {"best": 1.5, "validation": [{}, {}]}},
    "differences": {
        "base": {
            "identity_top1": difference(0.57),
            "image_error": difference(-0.04),
            "caption_accuracy": difference(0.0),
        }
    },
    "evaluation": {"test": {"num_candidates": 32, "identity_seed": 0}},
    "facts": {"base_hash": "abc"},
    "versions": {"jax": "0.10"},
}


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "grid.png").write_bytes(b"picture")
    results_page.add_record(
        tmp_path,
        tmp_path / "metrics.json",
        tmp_path / "grid.png",
        name="demo",
        title="The demo",
        command="make demo",
        machine="2 cores",
    )
    text = "# Title\n<!-- results: demo -->\nold\n<!-- /results -->\nRest.\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def test_pages_follow_the_records(repository):
    assert len(results_page.stale_pages(repository)) == 2
    results_page.write_pages(repository)
    assert results_page.stale_pages(repository) == []
    readme = (repository / "README.md").read_text()
    assert readme.startswith("# Title\n<!-- results: demo -->\n") and readme.endswith("Rest.\n")
    assert "old" not in readme and "![The demo](docs/pictures/demo.png)" in readme
    assert "| generated LoRA | 0.600 ± 0.010 |" in readme
    assert "0.86 ± 0.04" in readme and "2,000× less" in readme
    page = (repository / "docs" / "results.md").read_text()
    assert "`make demo` on 2 cores." in page and "+0.570 ± 0.010" in page
    assert (repository / "docs" / "pictures" / "demo.png").read_bytes() == b"picture"


def test_tables_of_drawings_follow(repository):
    record = {
        "title": "Two people", "command": "python tools/drawing.py regions",
        "columns": ["", "left"], "rows": [["apart", "0.7 ± 0.1"]], "note": "Told apart.",
        "pictures": ["pictures/two.png"],
    }  # fmt: skip
    file = repository / "docs" / "measurements" / "drawing_regions.json"
    file.write_text(json.dumps(record))
    results_page.write_pages(repository)
    page = (repository / "docs" / "results.md").read_text()
    told = page.partition("## Two people")[2]
    assert "![Two people](pictures/two.png)" in told and "| apart | 0.7 ± 0.1 |" in told
    assert "`python tools/drawing.py regions`" in told and told.strip().endswith("Told apart.")


def test_a_changed_number_is_noticed(repository):
    results_page.write_pages(repository)
    file = repository / "docs" / "measurements" / "result_demo.json"
    record = json.loads(file.read_text())
    record["metrics"]["identity_top1"]["generated"]["mean"] = 0.7
    file.write_text(json.dumps(record))
    assert len(results_page.stale_pages(repository)) == 2
    results_page.write_pages(repository)
    page = repository / "docs" / "results.md"
    page.write_text(page.read_text().replace("0.700", "0.999"))
    assert [stale.name for stale in results_page.stale_pages(repository)] == ["results.md"]


def test_refused(repository, tmp_path):
    with pytest.raises(UserError, match="--name: found 'a b'"):
        results_page.add_record(tmp_path, "x", "y", name="a b", title="", command="", machine="")
    kwargs = {"name": "a", "title": "t", "command": "c", "machine": "m"}
    with pytest.raises(UserError, match="cannot be read as JSON"):
        results_page.add_record(tmp_path, tmp_path / "grid.png", "y", **kwargs)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="found list"):
        results_page.add_record(tmp_path, tmp_path / "list.json", "y", **kwargs)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="found no 'identity_top1'"):
        results_page.add_record(tmp_path, tmp_path / "other.json", "y", **kwargs)
    with pytest.raises(UserError, match=r"the run's grid\.png"):
        results_page.add_record(tmp_path, tmp_path / "metrics.json", tmp_path / "no", **kwargs)
    (repository / "README.md").write_text("<!-- results: other -->\n<!-- /results -->\n")
    with pytest.raises(UserError, match="marker 'other' has no"):
        results_page.stale_pages(repository)
    (repository / "docs" / "measurements" / "result_x.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match="found no title, command"):
        results_page.read_records(repository)


def test_program(repository, capsys):
    root = ["--root", str(repository)]
    assert make_results.main([*root, "--check"]) == 1
    assert make_results.main(root) == 0
    assert make_results.main([*root, "--check"]) == 0
    assert make_results.main([*root, "--name", "x"]) == 2
    assert "all six record a run" in capsys.readouterr().err
