import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.evaluate import compare
from hyperlora_jax.evaluate.compare import Method
from hyperlora_jax.evaluate.report import charts, figures, html_page, verdicts, wording
from hyperlora_jax.evaluate.report.summary import summarise

METHODS = ("base", "mean_lora", "shuffled", "nearest", "generated", "conventional")


def noisy(level):
    def sample(questions, strength):
        noise = np.random.default_rng(0).standard_normal(questions.exact.shape)
        return questions.exact + (level + abs(strength - 1.0)) * noise.astype(np.float32)

    return sample


@pytest.fixture(scope="module")
def results(test_set, validation_set, probe):
    levels = {"generated": 0.05, "conventional": 0.05}
    methods = [
        Method(name, noisy(levels.get(name, 3.0)), (0.8, 1.0) if name in levels else (1.0,))
        for name in METHODS
    ]
    return compare.compare(methods, validation_set, test_set, compare.scorer(probe))


@pytest.fixture(scope="module")
def summary(results, test_set, validation_set):
    return summarise(
        results,
        test_set,
        validation_set,
        torch_parity={"max_abs_diff": 2e-4, "unexpected_keys": 0, "missing_keys": 0},
        seconds={"train": 61.0, "generate_one_lora": 0.004, "fit_one_lora": 20.0},
        facts={"base_hash": "abc"},
    )


@pytest.fixture(scope="module")
def files(results, summary, test_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    chart = charts.histogram_chart({"a": [0.0, 1.0], "b": [1.0, 2.0]}, "distance")
    extra = html_page.Figure("extra", chart, "An extra chart.", "Extra")
    return html_page.write_report(
        folder,
        summary,
        [*html_page.standard_figures(test_set, results), extra],
        title="A <title>",
        lead="Lead.",
        done=["Paragraph."],
    )


def test_metrics_json_has_the_agreed_shape(files, summary):
    written = json.loads(files.metrics.read_text())
    assert written == json.loads(json.dumps(summary))
    for score in ("identity_top1", "image_error", "caption_accuracy"):
        assert {*METHODS, "copy_reference", "exact"} <= set(written[score])
        for estimate in written[score].values():
            assert set(estimate) == {"mean", "stderr", "n"}
    assert set(written["paired"]) == {"generated", "conventional", "ratio", "ratio_stderr", "n"}
    assert set(written["torch_parity"]) == {"max_abs_diff", "unexpected_keys", "missing_keys"}
    assert written["seconds"]["fit_one_lora"] == 20.0
    assert written["identity_top1"]["exact"] == {"mean": 1.0, "stderr": 0.0, "n": 6}
    assert written["paired"]["ratio"] == 1.0
    assert written["strength"]["generated"]["best"] == 1.0
    assert written["versions"]["jax"]


def test_differences_find_who_is_better(summary):
    against_base = summary["differences"]["base"]
    assert against_base["image_error"]["mean"] < 0 and against_base["image_error"]["z"] < -3
    assert summary["differences"]["conventional"]["identity_top1"]["mean"] == 0.0


def test_page_is_self_contained(files, summary):
    page = files.page.read_text()
    inlined = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert len(inlined) == len(files.figures) == page.count("<img")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "A &lt;title&gt;" in page and 'name="viewport"' in page
    assert f"{summary['identity_top1']['generated']['mean']:.3f}" in page
    for figure in files.figures.values():
        Image.open(figure).verify()


def test_page_begins_with_the_picture_and_how_to_read_it(files, summary):
    page = files.page.read_text()
    places = [
        page.index(text) for text in ("<figure>", "<b>exact answer</b>: what", "Lead.", "<table>")
    ]
    assert places == sorted(places) and "LoRA" not in page[page.index("<h1>") : places[0]]
    real = {**summary, "identity_top1": {"generated": {}}}
    del real["image_error"]
    names = [column["name"] for column in wording.reading(real)]
    assert names == ["reference", "another picture", "generated LoRA"]


def test_verdicts_follow_the_numbers(summary):
    texts = {line["text"]: line["tone"] for line in verdicts.verdicts(summary)}
    assert any("“base, no LoRA” in identity and in error" in text for text in texts)
    worse = json.loads(json.dumps(summary))
    worse["differences"]["base"]["identity_top1"]["mean"] = -0.5
    worse["torch_parity"]["missing_keys"] = 2
    worse["failures"]["generated"] = 7
    bad = [line["text"] for line in verdicts.verdicts(worse) if line["tone"] == "bad"]
    assert any("in one of identity and error only" in text for text in bad)
    assert any("2 missing keys" in text for text in bad)
    assert any("generated LoRA 7" in text for text in bad)


def test_a_generator_that_copies_its_reference_is_called_so(test_set, validation_set, probe):
    def copies(questions, strength):
        return np.repeat(questions.references[:, None], questions.num_captions, axis=1)

    def lines(sample):
        judge = compare.scorer(probe)
        results = compare.compare([Method("generated", sample)], validation_set, test_set, judge)
        found = verdicts.verdicts(summarise(results, test_set, validation_set))
        return {line["text"][:13]: line["tone"] for line in found if "cop" in line["text"]}

    assert lines(copies) == {"They may be c": "bad"}
    assert lines(noisy(0.05)) == {"They are no c": "good"}


def test_judges_get_a_table(summary):
    assert wording.judge_table(summary)["rows"] == []
    judged = {"similarity": {"generated": {"mean": 0.5, "stderr": 0.1, "n": 3}}}
    judges = {"dino": {**judged, "is_condition_encoder": False, "hash": "x"}}
    judges["own"] = {**judges["dino"], "is_condition_encoder": True}
    page = html_page.render_page({**summary, "judges": judges}, [], title="t", lead="l", done=[])
    assert "own (condition encoder)" in page and "0.500" in page and "Other judges" in page


def test_speed_up(summary):
    assert wording.speed_up(summary) == pytest.approx(5000.0)
    assert wording.duration(0.004) == "4 ms" and wording.duration(300.0) == "5.0 min"
    assert wording.speed_up({"seconds": {}}) is None


def test_grid_shows_pixels_unsmoothed(results, test_set):
    page = figures.main_grid(test_set, results, num_rows=2)
    cell = np.asarray(page)[
        figures.TITLE : figures.TITLE + figures.CELL,
        2 * figures.GAP + figures.CELL : 2 * (figures.GAP + figures.CELL),
    ]
    exact = np.uint8(test_set.exact[0, 0] * 255 + 0.5)
    np.testing.assert_array_equal(cell[::8, ::8], exact)


def test_worst_cases_come_worst_first(results, test_set):
    cases = figures.worst_cases(test_set, results["shuffled"], count=4)
    assert len({case.identity for case in cases}) == 4
    keys = [(case.recognised, -case.loss) for case in cases]
    assert keys == sorted(keys)
    rows = figures.worst_cases(test_set, results["exact"])
    assert all(case.mistaken_for == case.identity for case in rows)


def test_unknown_place():
    with pytest.raises(ValueError, match="expected a place"):
        html_page.Figure("a", b"", "", place="left")


def test_charts_are_pictures():
    chart = charts.line_chart({"zero": ([0, 5, 100], [0.1, 0.2, 0.5])}, "steps", "top-1", True)
    assert Image.open(io.BytesIO(chart)).size[0] > 300
