"""What the demo shows: its stages alone; what others say is in the log."""

import io
import os
import sys

import pytest
from rich.console import Console
from tqdm import tqdm

from hyperlora_jax.cli.config import find_file
from hyperlora_jax.demo import STAGES
from hyperlora_jax.demo_screen import Stage, opened


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("drawing pixel-art:  50%|█████     | 256/512 [00:01<00:00]", 0.1),
        ("hypernetwork: compiling train step…:   0%|     | 0/700 [00:00<?]", 0.2),
        ("hypernetwork:  50%|█████ | 350/700 [01:00<01:00, loss 0.1]", 0.6),
        ("evaluating nearest at 3 strengths", 0.0),
        ("Loading weights: 100%|███| 3/3", 0.0),
    ],
)
def test_how_far_a_stage_is(line, share):
    parts = (("drawing", 0.0, 0.2), ("hypernetwork", 0.2, 1.0))
    assert Stage("x", 1.0, parts).done(line) == pytest.approx(share)


def test_every_stage_s_parts_follow_each_other():
    for stage in STAGES.values():
        ends = [place for _, *both in stage.parts for place in both]
        assert ends == sorted(ends) and all(0 <= place <= 1 for place in ends)
        assert len(stage.title) <= 46
    assert STAGES["evaluate"].done("evaluating nearest at 3 strengths") == 0.8


def test_the_terminal_shows_stages_and_the_log_the_rest(tmp_path):
    shown, log = io.StringIO(), tmp_path / "demo.log"
    with opened(log, Console(file=shown, width=100)) as screen:
        with screen.stage("first", Stage("Do this", 1.0, (("work", 0.0, 1.0),))):
            os.write(2, b"a warning of C++\n")
            for _ in tqdm(range(5), desc="work", mininterval=0, file=sys.__stderr__):
                pass
            os.write(1, b"a line of ours\n")
        with (
            pytest.raises(ValueError, match="broken"),
            screen.stage("second", Stage("Do that", 1.0)),
        ):
            raise ValueError("broken")
    lines = shown.getvalue().splitlines()
    assert "✓ Do this" in lines[0] and "100 %" in lines[0]
    assert "Do that" in lines[1] and "✓" not in lines[1]
    assert len(lines) == 2 and list(screen.seconds) == ["first"]
    first, *bars, last = log.read_text().strip().splitlines()
    assert (first, last) == ("a warning of C++", "a line of ours")
    assert [bar.split("|")[-1].split()[0] for bar in bars] == ["5/5"]


def test_the_demo_s_config_is_found_beside_its_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find_file("demo").name == "demo.py"
