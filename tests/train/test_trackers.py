import json
import sqlite3
import struct
import sys
import time

import pytest
from etils import epath
from toy_task import fit_toy, toy_task

from hyperlora_jax import storage
from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.train import trackers


class Killed(Exception):
    pass


def killed_and_gone_on(workdir, name):
    """Ten steps with a checkpoint every five, of which the first start has logged seven."""

    def kill(position):
        if position == 7:
            raise Killed

    with pytest.raises(Killed):
        fit_toy(workdir, toy_task(kill), num_steps=10, trackers=(name,))
    fit_toy(workdir, num_steps=10, trackers=(name,))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows}
    assert list(losses) == list(range(1, 11))
    return losses


def tensorboard_losses(workdir):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    losses = {}
    for path in sorted((workdir / "tensorboard").glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == SessionLog.START:  # older steps from here on are void
                losses = {step: loss for step, loss in losses.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "loss":
                    assert event.step not in losses
                    losses[event.step] = value.simple_value
    return losses


def test_tensorboard_has_one_curve(tmp_path):
    expected = killed_and_gone_on(tmp_path, "tensorboard")
    assert tensorboard_losses(tmp_path) == pytest.approx(expected)


def wandb_records(path):
    """Records of an offline run's file: a log of LevelDB's form behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def history_rows(path):
    return sum(record.HasField("history") for record in wandb_records(path))


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_weights_and_biases_has_one_curve_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    expected = killed_and_gone_on(tmp_path, "wandb")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    end = time.monotonic() + 60
    while sum(map(history_rows, files)) < len(expected) and time.monotonic() < end:
        time.sleep(0.2)  # another process writes, when it comes to it
    runs, losses = set(), {}
    for record in (record for file in files for record in wandb_records(file)):
        if record.HasField("run"):
            runs.add((record.run.run_id, record.run.project, record.run.display_name))
        if record.HasField("history"):
            row = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            assert row["_step"] not in losses
            losses[row["_step"]] = row["loss"]
    number = json.loads((tmp_path / "tracker.json").read_text())["id"]
    assert runs == {(number, "hyperlora", f"{tmp_path.name}/toy")}
    assert losses == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore")  # trackio's own
def test_trackio_has_one_curve(tmp_path, monkeypatch):
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    expected = killed_and_gone_on(tmp_path / "run", "trackio")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    number = json.loads((tmp_path / "run" / "tracker.json").read_text())["id"]
    assert {name for name, _, _ in rows} == {f"run-{number}"}
    assert [step for _, step, _ in rows] == list(expected)
    assert [json.loads(row)["loss"] for _, _, row in rows] == pytest.approx([*expected.values()])


def test_events_of_a_workdir_in_a_bucket_are_uploaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(trackers, "UPLOAD_SECONDS", 0.0)
    pushed = []

    def push(workdir, *names):
        folder = storage.scratch(workdir)
        pushed.append({file.name: file.stat().st_size for file in (folder / names[0]).iterdir()})

    monkeypatch.setattr(storage, "push", push)
    board = trackers.TensorBoard(trackers.Run(epath.Path("gs://bucket/run"), "toy", {}, 0, 0))
    board.write({"loss": 1.0}, 1)
    board.close()
    (name,) = pushed[0]
    assert name.startswith("events.out.tfevents.")
    assert 0 < pushed[0][name] <= pushed[-1][name]


def test_a_package_that_is_not_installed_is_missed_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = ("--config", "configs/avatars.py", "--config.train.trackers=('tensorboard',)")
    assert main(["train", *config, "--workdir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "hyperlora train: train.trackers: package tensorboardX is not installed" in said
    assert 'pip install "hyperlora-jax[tensorboard]"' in said
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_a_login_is_missed_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="wandb has no API key; run `wandb login`, or set WANDB_M"):
        trackers.check_installed(("wandb",))


def test_a_damaged_record_of_the_id_is_named(tmp_path):
    (tmp_path / "tracker.json").write_text("[]")
    with pytest.raises(UserError, match=r"tracker\.json: is damaged, expected"):
        trackers.Run(epath.Path(tmp_path), "toy", {}, 0, 0).id()
