"""Full disks, lost machines, and the price of a save."""

import re

from hyperlora_jax.cli.process import PREEMPTED
from hyperlora_jax.train.checkpoints import complete_steps


def test_full_disk_stops_with_the_reason_and_keeps_the_last_checkpoint(tmp_path, run_toy):
    done = run_toy("--workdir", tmp_path, "--num_steps", 12, "--full_at", 8, check=False)
    assert done.returncode == 2
    assert re.search(r"cannot write (a checkpoint )?\(.*File too large", done.stderr)
    assert complete_steps(tmp_path / "checkpoints") == [5]


def test_sigterm_saves_the_step_and_exits_with_75(tmp_path, run_toy):
    done = run_toy("--workdir", tmp_path, "--terminate_at", 7, check=False)
    assert done.returncode == PREEMPTED
    assert complete_steps(tmp_path / "checkpoints") == [5, 8]
    assert run_toy("--workdir", tmp_path).returncode == 0
