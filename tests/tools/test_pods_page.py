import json

import pods_page
import pytest
import results_page

from hyperlora_jax.errors import UserError

RECORD = {
    "topology": "v5e-256", "chips": 256, "fits": True, "batch_per_chip": 16, "remat": "none",
    "mesh": {"data": 256, "fsdp": 1, "tensor": 1}, "effort": "low", "compile_seconds": 61.2,
    "bytes": {"arguments": 2**30, "temporaries": 2**31, "peak": 3 * 2**30, "limit": 16 * 2**30},
    "flops_per_chip": 2.5e13, "step_seconds_estimate": 0.25,
    "collective_bytes": {"all-reduce": {"data": 2**20, "slices": 2**20}, "permute": {"x": 2**21}},
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "docs" / "measurements"
    folder.mkdir(parents=True)
    refused = {k: RECORD[k] for k in (*pods_page.KEYS, "compile_seconds")} | {"fits": False}
    (folder / "pods_big.json").write_text(json.dumps([RECORD, refused]))
    (tmp_path / "docs" / "scaling.md").write_text("A\n<!-- pods -->\nold\n<!-- /pods -->\nB\n")
    return tmp_path


def test_the_page_is_filled_from_the_records(root):
    page = results_page.expected_pages(root)[root / "docs" / "scaling.md"]
    assert page.startswith("A\n<!-- pods -->\n| config |")
    assert page.endswith("|\n<!-- /pods -->\nB\n")
    assert "old" not in page
    cells = [cell.strip() for cell in page.splitlines()[4].strip("|").split("|")]
    assert cells[:3] == ["`big`", "v5e-256", "256"]
    assert cells[6:] == ["3.0 of 16.0", "25.0", "2", "2", "250 ms", "61 s, low effort"]
    assert "does not fit" in page.splitlines()[5]
    assert root / "docs" / "scaling.md" in results_page.stale_pages(root)
    results_page.write_pages(root)
    assert not results_page.stale_pages(root)


def test_a_file_that_holds_no_records_is_named(root):
    (root / "docs" / "measurements" / "pods_bad.json").write_text('[{"topology": "v5e-256"}]')
    with pytest.raises(UserError, match=r"pods_bad\.json: found no chips"):
        pods_page.read_pods(root)
