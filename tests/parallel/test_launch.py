"""The files in launch/: what they would run, and the local one really run."""

import os
import pathlib
import shlex
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from hyperlora_jax.train.checkpoints import complete_steps

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCH = ROOT / "launch"
COMMAND = ("hyperlora", "distill", "--config=configs/sd15.py", "--config.base=a b", "--workdir=w")


def filled_jobset(kind, slices="1"):
    """What gke.sh would apply."""
    done = run("gke.sh", "--dry-run", "run", *COMMAND, TYPE=kind, SLICES=slices, IMAGE="a/b:1")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


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
    arguments = ("--mesh=-1,1,1,4", "--flat", "--num_steps", 24, "--workdir", tmp_path)
    arguments += ("--step_seconds", 0.15)  # the signal is heard before the run ends
    done = run(
        "local_processes.sh", 2, 2, sys.executable, toy, *arguments, "--terminate_once_at", 6
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exit code 75, restart 1" in done.stderr
    assert complete_steps(tmp_path / "checkpoints")[-1] == 24


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
maker = multihost.first_then_others("file", make)
print(f"{os.environ['JAX_PROCESS_ID']} reads what {maker} made\\n", end="")  # in one write
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


def test_a_tpu_vm_by_default_and_by_name():
    kept = run("tpu_vm.sh", "--dry-run", "keep", *COMMAND)
    verbs = [line.split()[4] for line in kept.stdout.splitlines()]
    assert verbs == ["create", "describe", "ssh", "scp", "ssh", "ssh"]
    create, *_, install, start = kept.stdout.splitlines()
    assert "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite" in create
    assert "--project" not in create  # gcloud's own
    for extra in ("tpu", "gcs", "avatars", "tensorboard"):
        assert extra in install
    (words,) = (word for word in shlex.split(start) if word.startswith("--command="))
    remote = shlex.split(words.removeprefix("--command="))
    assert remote == ["bash", "hyperlora/worker.sh", "run", *COMMAND]
    named = run("tpu_vm.sh", "--dry-run", "create", NAME="pod", SPOT="1", PROJECT="p", ZONE="z")
    assert "tpu-vm create pod" in named.stdout and "--spot --zone=z --project=p" in named.stdout


@pytest.mark.parametrize(
    ("kind", "name", "zone", "version"),
    [
        ("v5p-128", "v5p-128", "us-east5-a", "v2-alpha-tpuv5"),
        ("v5e-16", "v5litepod-16", "us-central1-a", "v2-alpha-tpuv5-lite"),
        ("v6e-256", "v6e-256", "us-east5-b", "v2-alpha-tpuv6e"),
        ("v4-64", "v4-64", "us-central2-b", "tpu-ubuntu2204-base"),
    ],
)
def test_zone_and_software_follow_the_chip(kind, name, zone, version):
    (line,) = run("tpu_vm.sh", "--dry-run", "create", TYPE=kind).stdout.splitlines()
    assert f"--accelerator-type={name} --version={version} --zone={zone}" in line


@pytest.mark.parametrize(("kind", "said"), [("tpu7x-8", "GKE only"), ("h100", "expected v4-")])
def test_a_chip_that_no_tpu_vm_has(kind, said):
    done = run("tpu_vm.sh", "--dry-run", "create", TYPE=kind)
    assert done.returncode == 2 and said in done.stderr


def test_several_slices_are_one_queued_resource():
    queued = run("tpu_vm.sh", "--dry-run", "create", NODES="2", SPOT="1").stdout
    assert "queued-resources create hyperlora" in queued
    assert "--node-count=2 --node-prefix=hyperlora --spot" in queued
    assert "--node-id=hyperlora" in run("tpu_vm.sh", "--dry-run", "queue").stdout
    started = run("tpu_vm.sh", "--dry-run", "run", "hyperlora", "train", NODES="2").stdout
    assert [line.split()[5] for line in started.splitlines()] == ["hyperlora-0", "hyperlora-1"]
    for one in ({"NODES": "2"}, {"QUEUED": "1"}):
        deleted = run("tpu_vm.sh", "--dry-run", "delete", **one).stdout
        assert "queued-resources delete hyperlora --force --quiet" in deleted
    assert "tpu-vm delete hyperlora --quiet" in run("tpu_vm.sh", "--dry-run", "delete").stdout
    followed = run("tpu_vm.sh", "--dry-run", "logs", "-f", WORKER="3").stdout
    assert "--worker=3" in followed and "worker.sh\\ logs\\ -f" in followed


def test_gke_calls():
    image = run("gke.sh", "--dry-run", "image", IMAGE="a/b:1").stdout
    assert "--build-arg EXTRAS=tpu\\,gcs\\,avatars\\,tensorboard -t a/b:1" in image
    assert "docker push a/b:1" in image
    for verb in ("image", "run x"):
        missing = run("gke.sh", "--dry-run", *verb.split(), IMAGE="")
        assert missing.returncode == 2 and "IMAGE is not set" in missing.stderr
    for verb in ("status", "logs", "wait", "delete"):
        assert "kubectl " in run("gke.sh", "--dry-run", verb, NAME="n").stdout


@pytest.mark.parametrize(
    "script", ["local_processes.sh", "slurm.sh", "tpu_vm.sh", "worker.sh", "gke.sh"]
)
def test_wrong_use_exits_with_2(script):
    done = run(script)
    assert done.returncode == 2
    assert "usage:" in done.stderr


@pytest.mark.parametrize(
    ("kind", "slices", "label", "topology", "hosts", "chips"),
    [
        ("v5p-128", 1, "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v5litepod-8", 1, "tpu-v5-lite-podslice", "2x4", 1, 8),
        ("2xv6e-256", 2, "tpu-v6e-slice", "16x16", 64, 4),
        ("tpu7x-4", 1, "tpu7x", "2x2x1", 1, 4),
    ],
)
def test_the_jobset_of_a_slice_and_a_command(kind, slices, label, topology, hosts, chips):
    jobset = filled_jobset(kind)
    replicated = jobset["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (
        slices,
        hosts,
        hosts,
    )
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (container,) = pod["containers"]
    assert container["command"] == list(COMMAND) and container["image"] == "a/b:1"
    assert container["resources"]["limits"] == {"google.com/tpu": chips}


def test_the_jobset_restarts_on_preemption_and_not_on_bad_input():
    jobset = filled_jobset("v5p-128")
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
    jobset = filled_jobset("v6e-32", slices="3")
    newest = kubernetes_validate.latest_version()
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
        job["spec"] = replicated["template"]["spec"]
        kubernetes_validate.validate(job, newest, strict=True)
        job["spec"] = {**job["spec"], "backofLimit": 0}
        with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
            kubernetes_validate.validate(job, newest, strict=True)


def test_shellcheck():
    scripts = [*LAUNCH.glob("*.sh"), *(ROOT / "tools").glob("*.sh"), *HERE.glob("*.sh")]
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
