"""docs/quickstart.ipynb, run from its first cell to its last in a kernel of its own."""

import os
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
ROW = re.compile(r"^\| ([\w, ]+) \| ([\d.]+) ± \S+ \| ([\d.]+) ± \S+ \| ([\d.]+) ±", re.MULTILINE)


def table(notebook):
    """{method: (identity top-1, error, caption parts)} of the table that a notebook shows."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = [output.get("data", {}).get("text/markdown", "") for output in outputs]
    rows = [row for text in texts for row in ROW.findall(text)]
    return {name: tuple(map(float, scores)) for name, *scores in rows}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_and_shows_what_is_kept_in_it(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    paths = os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", paths)
    kept = nbformat.read(NOTEBOOK, as_version=4)
    ran = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(ran, timeout=900, resources=where).execute()
    scores = table(ran)
    assert set(scores) == {"exact answer", "generated LoRA", "shuffled reference", "base, no LoRA"}
    best, generated = scores["exact answer"], scores["generated LoRA"]
    assert best == (1, 0, 1)
    for control in ("shuffled reference", "base, no LoRA"):
        assert generated[0] > scores[control][0] + 0.5 and generated[1] < scores[control][1] / 2
    for name, shown in table(kept).items():
        assert shown == pytest.approx(scores[name], abs=0.04), name
    pictures = [
        len(output.get("data", {}).get("image/png", ""))
        for cell in ran.cells
        for output in cell.get("outputs", ())
    ]
    assert sum(size > 0 for size in pictures) == 4 and len(table(kept)) == len(scores)
    assert (tmp_path / "person.safetensors").exists()
    assert NOTEBOOK.stat().st_size < 200_000
