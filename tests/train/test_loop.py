import json
import logging
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import ToyBatches, fit_toy, loss, toy_task

from hyperlora_jax.errors import Interrupted, Preempted, TrainingDiverged, UserError
from hyperlora_jax.train.checkpoints import best_step, restore_params
from hyperlora_jax.train.json_lines import read_rows


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_rows(workdir / "metrics.jsonl")}


def send_sigterm_at(step):
    return lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == step else None


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory):
    """The folder and the last state of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, fit_toy(workdir)


@pytest.fixture(name="finished")
def _finished(whole, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(whole[0], tmp_path / "run")


def test_learns_and_logs_each_step_once(tmp_path):
    state = fit_toy(tmp_path, num_steps=40)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert {"absolute_error", "grad_norm", "learning_rate", "examples_per_second", "data_wait"} < {
        *rows[0]
    }
    assert int(state.step) == 40
    assert json.loads((tmp_path / "config.json").read_text())["facts"] == {"spec": "abc"}


def test_logged_loss_is_that_steps_own(tmp_path):
    fit_toy(tmp_path / "every", num_steps=8)
    fit_toy(tmp_path / "some", num_steps=8, log_every_steps=4)
    every, some = losses(tmp_path / "every"), losses(tmp_path / "some")
    assert some == {step: every[step] for step in (1, 4, 8)}


def test_ema_is_between_start_and_end(tmp_path, whole):
    _, state = whole
    assert not np.allclose(state.ema["out"]["kernel"], state.params["out"]["kernel"])
    assert fit_toy(tmp_path / "none", ema_decay=None).ema is None


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, whole):
    folder, state = whole
    with pytest.raises(Preempted, match="saved step 8") as caught:
        fit_toy(tmp_path / "cut", toy_task(send_sigterm_at(7)))
    assert caught.value.step == 8
    assert_same(fit_toy(tmp_path / "cut"), state)
    assert losses(tmp_path / "cut") == losses(folder)


def test_the_first_ctrl_c_saves_and_the_second_leaves(tmp_path, whole, capsys):
    def once(n):
        if n == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="the same command goes on from step 8"):
        fit_toy(tmp_path / "cut", toy_task(once))
    assert "Ctrl-C again leaves at once" in capsys.readouterr().err
    assert_same(fit_toy(tmp_path / "cut"), whole[1])

    def twice(n):
        once(n)
        once(n)

    with pytest.raises(KeyboardInterrupt):
        fit_toy(tmp_path / "left", toy_task(twice))
    assert restore_params(tmp_path / "left")[1]["step"] == 5  # the last interval


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    fit_toy(tmp_path, num_steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_sigkill_loses_at_most_the_interval(tmp_path, whole, run_toy):
    done = run_toy("--workdir", tmp_path, "--num_steps", 12, "--kill_at", 11, check=False)
    assert done.returncode == -signal.SIGKILL
    seen = []
    state = fit_toy(tmp_path, toy_task(seen.append))
    assert seen[0] in (5, 10)  # 10 only if its write was over before the kill
    assert_same(state, whole[1])


def test_finished_workdir_gives_its_state_without_touching_data(whole, finished):
    def forbidden(n):
        raise AssertionError(f"batch {n} was read")

    assert_same(fit_toy(finished, toy_task(forbidden)), whole[1])


def test_longer_run_goes_on(tmp_path):
    fit_toy(tmp_path, num_steps=6)
    seen = []
    assert int(fit_toy(tmp_path, toy_task(seen.append), num_steps=9).step) == 9
    assert seen == [6, 7, 8]


def test_keeps_only_the_newest_checkpoints(tmp_path):
    fit_toy(tmp_path, checkpoint_every_steps=2, keep=2, keep_best=0)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "12"]


def test_keeps_the_best_checkpoint_also_over_a_restart(tmp_path):
    class Worsening(ToyBatches):  # from the seventh batch on
        def __next__(self):
            n, batch = self.position, super().__next__()
            return {**batch, "y": batch["y"] + (100.0 if n >= 6 else 0.0)}

    fit_toy(tmp_path, toy_task(batches=Worsening()), 10, checkpoint_every_steps=2, keep=2)
    folder = tmp_path / "checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir()) == [6, 8, 10]
    fit_toy(tmp_path, toy_task(batches=Worsening()), 16, checkpoint_every_steps=2, keep=2)
    assert sorted(int(path.name) for path in folder.iterdir()) == [6, 14, 16]
    assert best_step(folder) == 6
    assert restore_params(tmp_path, step="best")[1]["step"] == 6


def test_frozen_base_is_never_written(tmp_path):
    big = {"shift": jnp.zeros(4), "base": jnp.ones((512, 512))}
    state = fit_toy(tmp_path, toy_task(frozen=big))
    trainable = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    arrays = sum(
        path.stat().st_size
        for path in (tmp_path / "checkpoints" / "12" / "state").rglob("*")
        if path.parent.name == "d"
    )
    assert arrays < trainable + 2**15 < big["base"].nbytes


def test_other_facts_are_refused(finished):
    with pytest.raises(UserError, match=r"made with spec = 'abc', this run has spec = 'xyz'"):
        fit_toy(finished, toy_task(facts={"spec": "xyz"}))


# Cut off by a full disk.
TEXTS = {"mark": "_CHECKPOINT_METADATA", "facts": "meta/metadata", "loss": "metrics/metrics"}


@pytest.mark.parametrize("kind", ["empty", "no_metadata", "temporary", *TEXTS])
def test_half_written_checkpoint_is_skipped_by_name(whole, finished, caplog, kind):
    folder = finished / "checkpoints" / "12"
    if kind == "empty":
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    elif kind == "no_metadata":
        (folder / "state" / "_METADATA").unlink()
    elif kind in TEXTS:
        (folder / TEXTS[kind]).write_text((folder / TEXTS[kind]).read_text()[:-2])
    else:
        folder.rename(folder.with_name("12.orbax-checkpoint-tmp"))
    with caplog.at_level(logging.WARNING):
        assert_same(fit_toy(finished), whole[1])
    assert "skipping half-written checkpoint" in caplog.text
    assert "checkpoints/12" in caplog.text


# Orbax's other reads of the same checkpoint end after its event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_failed_restore_is_an_error_and_never_a_fresh_start(finished):
    for path in (finished / "checkpoints" / "12" / "state").rglob("*"):
        if path.parent.name == "d":
            path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"checkpoints/12: cannot restore this checkpoint"):
        fit_toy(finished)
    time.sleep(0.3)


def test_checkpoint_of_another_model_is_an_error(finished):
    other = toy_task(init=lambda key: {"hidden": {"kernel": jnp.zeros((3, 3))}})
    with pytest.raises(UserError, match=r"sound, but .*this run's model: params.hidden.bias has"):
        fit_toy(finished, other)


def test_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir .*file/run: cannot write there"):
        fit_toy(tmp_path / "file" / "run")


def test_read_only_workdir():
    with pytest.raises(UserError, match="--workdir /proc/self: cannot write there"):
        fit_toy("/proc/self")


def test_not_a_number_stops_with_the_records_and_keeps_the_checkpoint(tmp_path):
    def broken(params, frozen, batch, key):
        values, metrics = loss(params, frozen, batch, key)
        return jnp.where(jnp.any(batch["x"] > 1e8), jnp.nan, values), metrics

    class Poisoned(ToyBatches):
        def __next__(self):
            batch = super().__next__()
            if self.position == 7:
                batch["x"][3] = 1e9
            return batch

    task = toy_task(loss=broken, batches=Poisoned())
    with pytest.raises(
        TrainingDiverged, match=r"step 7 \(last finite: 6\).*record-6-0, record-6-1"
    ):
        fit_toy(tmp_path, task)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]


def test_data_that_ends(tmp_path):
    class Ending(ToyBatches):
        def __next__(self):
            if self.position == 3:
                raise StopIteration
            return super().__next__()

    with pytest.raises(UserError, match="data ended before step 4"):
        fit_toy(tmp_path, toy_task(batches=Ending()))
