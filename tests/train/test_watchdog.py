import signal
import time

from hyperlora_jax.train.interruption import Watchdog, diagnosis


def test_names_the_processes_that_are_behind(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 4)
    text = diagnosis(17, 60.0, {0: 17, 1: 16, 2: 17})
    assert "no progress for 60 s after step 17" in text
    assert "behind are processes [1], which last finished step 16" in text
    assert "processes [3] never finished a step" in text
    assert "all processes finished step 5" in diagnosis(5, 1.0, {0: 5, 1: 5, 2: 5, 3: 5})


def test_barks_only_after_silence():
    said = []
    with Watchdog(0.2, on_stall=said.append) as dog:
        time.sleep(0.4)  # not armed before the first step
        for step in range(1, 5):
            dog.beat(step)
            time.sleep(0.05)
        dog.pause()
        time.sleep(0.4)
        assert said == []
        dog.beat(5)
        time.sleep(0.6)
    assert len(said) == 1
    assert "after step 5" in said[0]


def test_a_stalled_run_dies_by_a_signal_and_says_why(tmp_path, run_toy):
    done = run_toy("--workdir", tmp_path, "--hang_at", 6, "--stall_timeout", 1, check=False)
    assert done.returncode == -signal.SIGABRT
    assert "stalled: no progress for" in done.stderr
    assert "after step 6 (process 0)" in done.stderr
