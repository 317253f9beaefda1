"""What ends one of two real processes ends both, by the same exit code and long before any
time-out of JAX (5 minutes in its shutdown barrier, 100 s for a heartbeat)."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from hyperlora_jax.parallel import joint_end
from hyperlora_jax.train.checkpoints import complete_steps

PROGRAM = str(pathlib.Path(__file__).parent / "failing_command.py")
SOON = 90  # seconds, with the start of both processes on a busy machine


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The step is compiled by the first test that takes one."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run_both(as_hosts, cache):
    """Runs a command line in two processes, the second with `more`: [(exit code, out, err)]."""

    def run(*command, more=()):
        shared = {**os.environ, "JAX_PLATFORMS": "cpu", "HYPERLORA_CACHE": str(cache)}
        running = [
            subprocess.Popen(
                [sys.executable, *map(str, command), *further],
                env={**shared, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for own, further in zip(as_hosts(), ((), more), strict=True)
        ]
        try:
            said = [process.communicate(timeout=SOON) for process in running]
        finally:
            for process in running:
                process.kill()
        return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]

    return run


@pytest.mark.parametrize(
    ("at", "on"),
    [
        ("make", (0,)),  # the other waits at a barrier, with a patience of days
        pytest.param("make", (1,), marks=pytest.mark.slow),
        ("make", (0, 1)),
        # The other waits for a word of the first.
        pytest.param("agree", (0,), marks=pytest.mark.slow),
        # Before the first step: the other waits in the step's collective.
        pytest.param("0", (0,), marks=pytest.mark.slow),
        ("6", (1,)),  # after it
    ],
)
def test_bad_input_on_one_process_ends_both_with_2(run_both, tmp_path, at, on):
    fail = (PROGRAM, "--workdir", tmp_path, "--harm", "bad_input", "--at", at, "--on", *on)
    results = run_both(*fail)
    assert [code for code, *_ in results] == [2, 2], results
    for index, (_, out, error) in enumerate(results):
        assert "Traceback" not in error and "Fatal" not in error
        line = "hyperlora fail: shoe.png: no picture"
        own = f"\n{error}".count(f"\n{line}")
        told = error.count(f"process {on[0]} ended this run: {line}")
        assert own + told == 1 and (own == 0 or index in on), error
        # Nothing but the first process's results is on standard output.
        assert out == ("a result of this command\n" if index == 0 else "")
    if at == "6":
        assert complete_steps(tmp_path / "checkpoints") == [5]


def test_wrong_arguments_of_one_process_end_both_with_2(run_both, tmp_path):
    fail = (PROGRAM, "--workdir", tmp_path, "--at", "agree")
    results = run_both(*fail, more=["--quick"])
    assert [code for code, *_ in results] == [2, 2], results
    assert "process 1 ended this run: hyperlora fail: unknown argument '--quick'" in results[0][2]


def test_a_bug_on_one_process_ends_both_with_1(run_both, tmp_path):
    results = run_both(PROGRAM, "--workdir", tmp_path, "--harm", "bug", "--at", 3, "--on", 1)
    assert [code for code, *_ in results] == [1, 1], results
    assert "Traceback" not in results[0][2]
    assert "process 1 ended this run: ZeroDivisionError: by none" in results[0][2]
    assert "in bug\n" in results[1][2]


def test_a_process_that_is_killed_ends_the_other_by_a_signal_too(run_both, tmp_path):
    results = run_both(PROGRAM, "--workdir", tmp_path, "--harm", "lost", "--at", 3, "--on", 1)
    assert [code for code, *_ in results] == [-signal.SIGABRT, -signal.SIGKILL], results
    assert "Gloo" in results[0][2]


def test_sigterm_ends_a_command_that_has_no_steps_to_save(run_both, tmp_path):
    fail = (PROGRAM, "--workdir", tmp_path, "--at", "make", "--harm", "terminated")
    results = run_both(*fail, "--on", 0, 1)
    # The second may see the first one's end before its own signal.
    assert results[0][0] == -signal.SIGTERM, results
    assert results[1][0] in (-signal.SIGTERM, -signal.SIGABRT), results


@pytest.mark.slow
def test_a_full_disk_on_the_first_process_ends_both_with_2(run_both, tmp_path):
    """A save is under way, of which the other process waits to write its part."""
    results = run_both(PROGRAM, "--workdir", tmp_path, "--harm", "full_disk", "--at", 6, "--on", 0)
    assert [code for code, *_ in results] == [2, 2], results
    assert "metrics.jsonl: cannot write (File too large)" in results[1][2]


def test_whose_fault_an_error_is():
    gone = "UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:5518"
    assert joint_end.of_error(ValueError(gone)).code == -signal.SIGABRT
    unavailable = jax.errors.JaxRuntimeError("UNAVAILABLE: socket closed\nlong story")
    assert joint_end.of_error(unavailable) == joint_end.End(
        -signal.SIGABRT, "JaxRuntimeError: UNAVAILABLE: socket closed"
    )
    assert joint_end.of_error(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out")).code == 1
    assert joint_end.of_error(OSError("Connection refused")).code == 1
    assert joint_end.of_error(KeyError()).line == "KeyError: KeyError()"


@pytest.mark.parametrize(
    "command",
    [
        "distill",
        pytest.param("train", marks=pytest.mark.slow),
        pytest.param("evaluate", marks=pytest.mark.slow),
    ],
)
def test_a_command_with_a_folder_that_is_not_there(run_both, tmp_path, command):
    config = ("--config", "configs/avatars.py", "--config.data.source=nopics")
    results = run_both("-m", "hyperlora_jax", command, *config, "--workdir", tmp_path / "run")
    assert [code for code, *_ in results] == [2, 2], results
    assert any(f"\nhyperlora {command}: " in f"\n{error}" for *_, error in results), results
