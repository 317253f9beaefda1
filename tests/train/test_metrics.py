import jax
import pytest
from toy_task import fit_toy, toy_task

from hyperlora_jax.train.json_lines import read_rows
from hyperlora_jax.train.reporting import Throughput


def test_units_and_mfu(monkeypatch):
    monkeypatch.setattr("hyperlora_jax.train.reporting.peak_flops", lambda kind: 1e9)
    meter = Throughput({"images": 4})
    meter.count_flops(lambda: 1e6)
    meter.add(100, 0.0)
    figures = meter.take()
    assert figures["images_per_second"] == pytest.approx(4 * figures["examples_per_second"])
    assert figures["mfu"] > 0
    assert "mfu" not in Throughput({}).take()


def test_mfu_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("hyperlora_jax.train.reporting.peak_flops", lambda kind: 1e9)
    fit_toy(tmp_path, num_steps=2)
    row = read_rows(tmp_path / "metrics.jsonl")[1]
    per_example = 3 * 2 * (8 * 32 + 32 * 4)  # three times the forward pass
    expected = per_example * row["examples_per_second"] / 1e9 / jax.device_count()
    assert row["mfu"] == pytest.approx(expected)


def test_profile_and_units_of_a_run(tmp_path):
    task = toy_task(units={"images": 4, "loras": 1})
    fit_toy(tmp_path, task, num_steps=4, profile_steps=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "loras_per_second" in read_rows(tmp_path / "metrics.jsonl")[0]
