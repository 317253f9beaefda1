import json

import experiments_page
import numpy as np
import pytest
import results_page

from hyperlora_jax.errors import UserError


def row(run="ridge", seed=0, mean=0.5):
    score = {"mean": mean, "stderr": 0.03, "n": 64}
    return {
        "run": run, "seed": seed, "identity_top1": score, "image_error": score,
        "caption_accuracy": score, "strength": 2.0, "guidance": 1.0, "steps": 1500,
        "cpu_seconds": 90.0,
    }  # fmt: skip


def record(*rows):
    return {"name": "a", "title": "Which one?", "command": "python x.py a", "rows": list(rows)}


def test_seeds_share_one_row_and_their_spread_widens_the_error():
    rows = experiments_page.table(record(row(), row(seed=1, mean=0.7), row("knn")))
    assert [cells[0] for cells in rows] == ["ridge", "knn"]
    spread = np.std([0.5, 0.7], ddof=1) / np.sqrt(2)
    assert rows[0][1] == f"0.600 ± {np.hypot(0.03, spread):.3f}"
    assert rows[0][-1] == "2"
    assert rows[1][1] == "0.500 ± 0.030"


def test_rows_that_differ_in_one_thing_are_compared():
    grid = record(
        *(row(f"raw, {name}", mean=mean) for name, mean in (("adalora", 0.5), ("adanorm", 0.6))),
        *(row(f"VAE latents, {name}", mean=0.3) for name in ("adalora", "adanorm")),
        row("raw, adalora, wider", mean=0.9),
    )
    told = experiments_page.section({**grid, "name": "paper"})[2]
    assert "adalora minus adanorm: -0.050 ± 0.050 over 2 pairs" in told
    assert "VAE latents minus raw: -0.250 ± 0.050 over 2 pairs" in told
    assert "minus" not in experiments_page.section(grid)[2]


def test_more_seeds_never_make_the_identities_error_smaller():
    mean, error = experiments_page.across_seeds([{"mean": 0.5, "stderr": 0.03}] * 9)
    assert (mean, error) == pytest.approx((0.5, 0.03))


def test_what_a_recipe_is_chosen_by_says_so_and_tells_nothing_of_a_training():
    chosen = record({**row(), "choosing": True})
    assert experiments_page.table(chosen)[0][-1] == "2"
    assert experiments_page.columns(chosen)[-1] == "strength"
    assert "64 validation identities" in experiments_page.section(chosen)[-1]
    assert "Not run yet" not in experiments_page.section(chosen)[-1]
    unfinished = experiments_page.section({**chosen, "missing": ["600 steps", "50 steps"]})
    assert unfinished[-1].endswith("Not run yet: 600 steps; 50 steps.")


def test_the_page_holds_every_record(tmp_path):
    folder = tmp_path / "docs" / "measurements"
    folder.mkdir(parents=True)
    (folder / "experiment_a.json").write_text(json.dumps(record(row())))
    page = results_page.expected_pages(tmp_path)[tmp_path / "docs" / "results.md"]
    assert "## Which one?" in page
    assert "| ridge | 0.500 ± 0.030 |" in page
    assert "64 held-out identities" in page


def test_a_file_that_is_no_record_is_named(tmp_path):
    folder = tmp_path / "docs" / "measurements"
    folder.mkdir(parents=True)
    (folder / "experiment_b.json").write_text("{}")
    with pytest.raises(UserError, match=r"experiment_b\.json: found no name, title"):
        experiments_page.read_experiments(tmp_path)
