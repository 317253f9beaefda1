"""launch/tpu_vm.sh with a gcloud and a uv of this test: a slice's life from nothing to the end."""

import os
import pathlib
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
UV = """#!/usr/bin/env bash
# uv as launch/worker.sh calls it; what it installs counts steps, and goes on where they ended.
echo "$*" >>"$CLOUD/calls"
if [[ $1 == venv ]]; then
  mkdir -p venv/bin
else
  test -f source/setup.py -a -f source/configs/avatars.py -a -f source/LICENSE
  test -f constraints.txt -a -f configs/avatars.py
  cp "$CLOUD/hyperlora" venv/bin/hyperlora
fi
"""
HYPERLORA = """#!/usr/bin/env bash
[[ $HYPERLORA_DISTRIBUTED == 1 && $# == 3 && $3 == "--config.base=a b" ]] || exit 2
[[ $PWD == */worker-0/* ]] || { sleep 1; exit "${ENDS_WITH:-0}"; }
trap 'echo saved; exit 75' TERM
while (($(grep -c . "$CLOUD/steps") < 8)); do
  echo "step of process $$" >>"$CLOUD/steps"
  echo "done $(grep -c . "$CLOUD/steps")"
  sleep 0.5
done
exit "${ENDS_WITH:-0}"
"""
COMMAND = ("hyperlora", "train", "--config=x", "--config.base=a b")


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder that is the cloud; its programs come first on PATH."""
    (tmp_path / "steps").write_text("")
    for name, text in {
        "gcloud": (ROOT / "tests/parallel/fake_gcloud.sh").read_text(),
        "uv": UV,
        "hyperlora": HYPERLORA,
    }.items():
        file = tmp_path / ("bin" if name != "hyperlora" else ".") / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CLOUD", str(tmp_path))
    monkeypatch.setenv("POLL_SECONDS", "0.3")
    return tmp_path


def tpu_vm(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "launch/tpu_vm.sh"), *arguments],
        env={**os.environ, "TYPE": "v6e-8", "NAME": "pod", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def calls(cloud, *verbs):
    """The verbs of the calls so far, in order, repetitions left out."""
    found = []
    for line in (cloud / "calls").read_text().splitlines():
        words = line.split()
        verb = words[3] if words[0] == "compute" else f"uv {words[0]}"
        verb = "run" if "worker.sh run" in line else verb
        if verb in verbs and found[-1:] != [verb]:
            found.append(verb)
    return found


def test_a_spot_slice_that_is_preempted_is_made_installed_and_started_again(cloud):
    (cloud / "preempt-at").write_text("3")
    kept = tpu_vm("keep", *COMMAND, SPOT="1")
    assert kept.returncode == 0, kept.stderr
    verbs = ("create", "scp", "uv venv", "uv pip", "run", "delete")
    life = ["create", "scp", "uv venv", "uv pip", "uv venv", "uv pip", "run"]
    assert calls(cloud, *verbs) == [*life, "delete", *life]
    text = (cloud / "calls").read_text()
    assert "create pod --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot" in text
    assert "venv --quiet --python 3.11 venv" in text
    assert "./source[tpu,gcs,avatars,tensorboard]" in text
    steps = (cloud / "steps").read_text().splitlines()
    assert len(steps) == 8 and len(set(steps)) == 2  # by two processes, one after the other
    assert "pod is PREEMPTED" in kept.stderr
    assert "the run on pod ended with exit code 0" in kept.stderr


def test_a_run_that_ends_by_bad_input_is_not_started_again(cloud):
    kept = tpu_vm("keep", *COMMAND[:3])
    assert kept.returncode == 2
    assert calls(cloud, "create", "run", "delete") == ["create", "run"]


def test_one_step_after_another(cloud):
    assert tpu_vm("create").returncode == 0
    waited = tpu_vm("wait")
    assert waited.returncode == 0 and "pod is CREATING" in waited.stderr
    assert tpu_vm("install", FILES=str(ROOT / "README.md")).returncode == 0
    assert (cloud / "pod/worker-1/hyperlora/README.md").exists()
    assert tpu_vm("status").stdout.count(": none") == 2
    assert tpu_vm("run", *COMMAND).returncode == 0
    again = tpu_vm("run", *COMMAND)
    assert again.returncode == 2 and "a run is under way" in again.stderr
    for _ in range(50):  # until worker 0 has a step in its log
        if "done 1" in tpu_vm("logs").stdout:
            break
        time.sleep(0.2)
    shown = tpu_vm("status").stdout
    assert "pod: READY" in shown and "running  done" in shown
    assert tpu_vm("stop").returncode == 0
    for _ in range(50):
        if "75" in tpu_vm("status").stdout:
            break
        time.sleep(0.2)
    assert "saved" in tpu_vm("logs").stdout
    assert len((cloud / "steps").read_text().splitlines()) < 8
    assert tpu_vm("delete").returncode == 0
    assert not (cloud / "pod").exists()
    missing = tpu_vm("wait")
    assert missing.returncode == 1 and "pod is MISSING" in missing.stderr
