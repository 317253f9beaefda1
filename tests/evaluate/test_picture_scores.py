"""Scores without exact pictures, on cases with known answers."""

import dataclasses

import numpy as np
import pytest

from hyperlora_jax.evaluate import compare
from hyperlora_jax.evaluate.compare import Method
from hyperlora_jax.evaluate.judges import judges
from hyperlora_jax.evaluate.judges.picture_scores import PictureScorer
from hyperlora_jax.evaluate.picture_sets import Sizes, in_order, make_picture_sets
from hyperlora_jax.evaluate.report import charts, figures, html_page, verdicts, wording
from hyperlora_jax.evaluate.report.summary import summarise
from hyperlora_jax.pictures import pictures
from hyperlora_jax.pictures.subjects import Subject


class MeanColour:
    """An encoder whose embedding is the mean colour around grey."""

    name, embedding_dim, hash = "colour", 3, "h"
    image_size, num_tokens = (8, 8), 1

    def encode(self, images):
        pooled = np.asarray(images).mean(axis=(1, 2)) - 0.5
        return pooled, pooled[:, None]


def subject(number):
    """One colour per subject, another brightness pattern per picture."""
    random = np.random.default_rng(number)
    colour = np.where([number & 1, number & 2, number & 4], 220, 40)
    noise = random.integers(-30, 30, (6, 8, 8, 1))
    drawn = np.uint8(np.clip(colour + noise, 0, 255))
    files = tuple(pictures.encode_png(picture) for picture in drawn)
    return Subject(f"s{number}", f"s{number}", files, files, ("a photo",) * 6)


@pytest.fixture(name="sets", scope="module")
def _sets():
    return make_picture_sets(
        in_order(map(subject, range(8)), 0),
        Sizes(num_identities=5, num_validation=3, num_captions=4, num_views=2, num_candidates=8),
    )


@pytest.fixture(name="results", scope="module")
def _results(sets):
    def grey(weight):
        return lambda q, strength: (1 - weight * strength) * q.others + weight * strength * 0.5

    def broken(questions, strength):
        drawn = questions.others[:2].copy()
        drawn[0, 1, 0, 0, 0] = np.nan
        return drawn

    methods = [
        Method("generated", grey(0.1), (0.5, 1.0)),
        Method("shuffled", lambda q, s: np.roll(q.others, 1, axis=0)),
        Method("base", lambda q, s: np.broadcast_to(q.others[:1], q.others.shape)),
        Method("conventional", broken),
    ]
    return compare.compare(methods, *sets, PictureScorer(MeanColour()))


def test_known_answers(results):
    own, other = results["generated"].scores, results["shuffled"].scores
    assert own.top1.min() == 1.0 and own.similarity.min() > 0.95
    assert other.top1.max() == 0.0 and other.similarity.max() < 0.7
    # One subject's pictures for everybody: right for that subject alone, chance among the five.
    assert results["base"].scores.top1.mean() == pytest.approx(1 / 5)
    np.testing.assert_array_equal(own.taken_for, np.arange(5)[:, None] * [1, 1, 1, 1])
    np.testing.assert_array_equal(other.taken_for[:, 0], [4, 0, 1, 2, 3])


def test_a_copied_reference_is_alike_and_frozen(results):
    copied = results["copy_reference"].scores
    assert copied.top1.min() == 1.0
    np.testing.assert_allclose(copied.diversity, 0.0, atol=1e-9)
    assert results["generated"].scores.diversity.min() > 0.3
    assert "exact" not in results


def test_failures_and_undetected_subjects_score_nothing(sets, results):
    scores = results["conventional"].scores
    assert scores.num_failures == 1 and scores.top1.shape == (2, 4)
    assert scores.top1[0, 1] == scores.similarity[0, 1] == 0.0
    seen = PictureScorer(MeanColour(), detects=lambda picture: picture[0, 0, 0] > 0.5)
    found = seen(sets[1], sets[1].others)
    hidden = sets[1].others[..., 0, 0, 0] <= 0.5
    assert 0 < hidden.sum() == found.num_failures
    np.testing.assert_array_equal(found.similarity == 0.0, hidden)


def test_duplicate_candidates_share_the_point(sets):
    test = sets[1]
    twins = dataclasses.replace(test, gallery=test.gallery[:1] * 8)
    found = PictureScorer(MeanColour())(twins, test.others)
    np.testing.assert_allclose(found.top1, 1 / 8)


def test_strength_prefers_identity_then_likeness(results):
    assert results["generated"].strength == 0.5
    assert charts.strength_chart(results)


def test_the_report_says_what_was_measured(sets, results, tmp_path):
    facts = {**sets[1].facts, "judge": "colour"}
    test = dataclasses.replace(sets[1], facts=facts)
    further = {"clip_text": {name: result.scores.top1 * 0.3 for name, result in results.items()}}
    summary = summarise(results, test, sets[0], further=further)
    table = wording.score_table(summary)
    assert table["columns"][:3] == ["identity top-1", "similarity", "prompt (CLIP-T)"]
    assert "by the judge colour, to the pictures" in table["note"]
    assert "no method was shown (4)" in table["note"] and "CLIP-T" in table["note"]
    texts = [line["text"] for line in verdicts.verdicts(summary)]
    assert any("“shuffled reference” in identity and in similarity" in text for text in texts)
    assert "clip_text" in summary["differences"]["base"]
    cases = figures.worst_cases(test, results["shuffled"])
    assert [c.mistaken_for for c in cases] == [(c.identity - 1) % 5 for c in cases]
    shown = html_page.standard_figures(test, results, num_rows=3)
    files = html_page.write_report(tmp_path, summary, shown, title="t", lead="l", done=[])
    page = files.page.read_text()
    assert "pictures the judge finds most similar" in page and "error (MSE)" not in page


def test_means_are_over_what_a_subject_has():
    counts = (6, 2, 3, 4)
    people = [
        dataclasses.replace(
            own, references=own.references[:n], targets=own.targets[:n], captions=own.captions[:n]
        )
        for own, n in zip(map(subject, range(4)), counts, strict=True)
    ]
    sizes = Sizes(num_identities=4, num_validation=0, num_captions=3, num_views=3, num_candidates=4)
    _, test = make_picture_sets(people, sizes)
    assert [len(own) for own in test.gallery] == [3, 1, 1, 1]
    scores = PictureScorer(MeanColour())(test, test.others)
    own = np.stack([judges.unit(MeanColour().encode(g / 255.0)[0]).mean(0) for g in test.gallery])
    drawn = judges.unit(MeanColour().encode(test.others.reshape(-1, 8, 8, 3))[0])
    expected = (drawn.reshape(4, 3, -1) * own[:, None]).sum(-1)
    np.testing.assert_allclose(scores.similarity, expected, rtol=1e-5)
    # With one picture to judge by, nothing can be said of how much they differ.
    assert np.isfinite(scores.diversity).tolist() == [True, False, False, False]
    results = compare.compare([], None, test, PictureScorer(MeanColour()))
    summary = summarise(results, test, None)
    assert summary["diversity"]["copy_reference"]["n"] == 1
    assert set(summary["evaluation"]) == {"test"}
    none = dataclasses.replace(scores, diversity=np.full(4, np.nan))
    result = dataclasses.replace(results["copy_reference"], scores=none)
    test = dataclasses.replace(test, facts={**test.facts, "judge": "colour"})
    summary = summarise({"copy_reference": result}, test, None)
    assert summary["diversity"]["copy_reference"] == {"mean": None, "stderr": None, "n": 0}
    cell = wording.score_table(summary)["rows"][0]["cells"][2]
    assert cell == {"value": "–", "pm": ""}
