import pytest

from hyperlora_jax.train.events import EventLog, as_text, goodput


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def run(path, clock, start_step, steps, seconds_per_step, end=True):
    log = EventLog(path, clock)
    clock.now += 2.0
    log.switch("restore")
    clock.now += 1.0
    log.event("resume", step=start_step)
    log.switch("step")
    for step in range(start_step + 1, start_step + steps + 1):
        clock.now += seconds_per_step
        log.alive(step, every_seconds=0.0)
    if end:
        log.event("end", step=start_step + steps)
    log.close()


def test_buckets_sum_to_wall_time_over_a_kill(tmp_path):
    path, clock = tmp_path / "events.jsonl", Clock()
    began = clock.now
    run(path, clock, start_step=0, steps=10, seconds_per_step=0.5, end=False)
    clock.now += 30.0
    run(path, clock, start_step=6, steps=14, seconds_per_step=0.5)
    buckets = goodput(path)
    assert buckets["down"] == pytest.approx(30.0)
    assert buckets["lost"] == pytest.approx(4 * 0.5)
    assert buckets["step"] == pytest.approx(20 * 0.5)
    assert buckets["start"] == pytest.approx(4.0)
    assert buckets["wall"] == pytest.approx(clock.now - began)
    assert "down 30.0 s (" in as_text(buckets)


def test_no_events(tmp_path):
    assert goodput(tmp_path / "events.jsonl") == {}


def test_a_real_run_accounts_for_its_wall_time(tmp_path):
    import time

    from toy_task import fit_toy

    from hyperlora_jax.train.json_lines import read_rows

    began = time.time()
    fit_toy(tmp_path)
    wall = time.time() - began
    buckets = goodput(tmp_path / "events.jsonl")
    assert buckets["compile"] > 0
    assert buckets["step"] > 0
    assert buckets["data"] > 0
    assert sum(v for k, v in buckets.items() if k != "wall") == pytest.approx(buckets["wall"])
    assert buckets["wall"] <= wall
    names = [row["event"] for row in read_rows(tmp_path / "events.jsonl")]
    assert names == ["start", "resume", "compiled", "save", "save", "save", "end"]


def test_rows_in_a_bucket_are_uploaded(tmp_path):
    from hyperlora_jax.train.json_lines import JsonLines, read_rows

    target = tmp_path / "far" / "metrics.jsonl"
    target.parent.mkdir()
    lines = JsonLines(target, [{"step": 1}], upload=True)
    lines.write({"step": 2, "loss": float("nan")})
    lines.close()
    assert read_rows(target) == [{"step": 1}, {"step": 2, "loss": None}]
