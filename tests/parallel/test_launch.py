"""The files in launch/: what they would run, and the local one really run."""

import os
import pathlib
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from hyperlora_jax.train.checkpoints import complete_steps

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def run(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *map(str, arguments)],
        env={**os.environ, "RESTART_SECONDS": "0", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def script_that_ends(tmp_path, *codes):
    """A command that ends with the next code each time; "KILL" dies by that signal."""
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    script = tmp_path / "command.sh"
    script.write_text(
        f"cd {tmp_path}; echo started >> log; code=$(head -1 codes); sed -i 1d codes;"
        ' [[ $code == KILL ]] && kill -KILL $$; exit "$code"'
    )
    return ["bash", script]


@pytest.mark.parametrize(
    ("codes", "expected", "starts"),
    [
        ((75, "KILL", 0), 0, 3),
        ((2, 0), 2, 1),
        ((75, 1, 0), 1, 2),
    ],
)
def test_restarts_on_75_and_on_signals_only(tmp_path, codes, expected, starts):
    done = run("run_with_restarts.sh", *script_that_ends(tmp_path, *codes))
    assert done.returncode == expected
    assert (tmp_path / "log").read_text().count("started") == starts


def test_gives_up_after_so_many_restarts(tmp_path):
    command = script_that_ends(tmp_path, *[75] * 9)
    assert run("run_with_restarts.sh", *command, MAX_RESTARTS="2").returncode == 75
    assert (tmp_path / "log").read_text().count("started") == 3


def test_two_local_processes_survive_a_preemption(tmp_path):
    toy = ROOT / "tests" / "train" / "toy_task.py"
    arguments = ("--mesh=-1,1,1,4", "--flat", "--num_steps", 60, "--workdir", tmp_path)
    done = run(
        "local_processes.sh", 2, 2, sys.executable, toy, *arguments, "--terminate_once_at", 6
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exit code 75, restart 1" in done.stderr
    assert complete_steps(tmp_path / "checkpoints")[-1] == 60


MADE_ONCE = """
import os, pathlib, sys, time
from hyperlora_jax.parallel import multihost

def make():
    if not file.exists():
        time.sleep(1.0)  # long enough for the other to look
        file.write_text(os.environ["JAX_PROCESS_ID"])
    return file.read_text()

file = pathlib.Path(sys.argv[1])
multihost.start()
print(os.environ["JAX_PROCESS_ID"], "reads what", multihost.first_then_others("file", make), "made")
"""


def test_what_is_made_for_all_is_made_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(MADE_ONCE)
    done = run("local_processes.sh", 2, 1, sys.executable, script, tmp_path / "made")
    assert done.returncode == 0, done.stderr[-3000:]
    for reader in "01":
        assert f"{reader} reads what 0 made" in done.stdout


def test_dry_runs_print_the_commands():
    local = run("local_processes.sh", "--dry-run", 2, 4, "hyperlora", "train")
    lines = local.stdout.splitlines()
    assert len(lines) == 2
    assert "JAX_PROCESS_ID=1 hyperlora train" in lines[1]
    slurm = run("slurm.sh", "--dry-run", "hyperlora", "train")
    assert slurm.stdout.strip() == "srun --kill-on-bad-exit=1 hyperlora train"
    created = run("tpu_vm.sh", "--dry-run", "create", NAME="pod", TYPE="v5e-16", SPOT="1")
    assert "gcloud compute tpus tpu-vm create pod --accelerator-type=v5e-16" in created.stdout
    assert "--spot" in created.stdout
    queued = run("tpu_vm.sh", "--dry-run", "queue", NODES="2")
    assert "queued-resources create hyperlora" in queued.stdout
    assert "--node-count=2" in queued.stdout
    started = run("tpu_vm.sh", "--dry-run", "run", NODES="2")
    assert started.stdout.count("--worker=all") == 2
    assert "run_with_restarts.sh" in started.stdout


@pytest.mark.parametrize("script", ["local_processes.sh", "slurm.sh", "tpu_vm.sh"])
def test_wrong_use_exits_with_2(script):
    done = run(script)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_the_jobset_restarts_on_preemption_and_not_on_bad_input():
    jobset = yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert job["parallelism"] == job["completions"]


def test_the_jobset_s_jobs_are_valid_kubernetes():
    """Of a JobSet itself no schema is published with Kubernetes; of what it repeats there is."""
    jobset = yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())
    newest = kubernetes_validate.latest_version()
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
        job["spec"] = replicated["template"]["spec"]
        kubernetes_validate.validate(job, newest, strict=True)
        job["spec"] = {**job["spec"], "backofLimit": 0}
        with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
            kubernetes_validate.validate(job, newest, strict=True)


def test_shellcheck():
    scripts = [*LAUNCH.glob("*.sh"), *(ROOT / "tools").glob("*.sh")]
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
