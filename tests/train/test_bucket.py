"""`hyperlora train` with everything in a bucket: pip install ".[gcs]" gcp-storage-emulator."""

import importlib.util
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NEEDED = ("gcsfs", "gcp_storage_emulator")
SETTINGS = {
    "data.num_identities": 32, "data.num_views": 4, "model.network.width": 32,
    "model.network.depth": 1, "model.network.num_heads": 2, "train.batch_size": 8,
    "train.images_per_subject": 1, "train.log_every_steps": 1, "train.checkpoint_every_steps": 5,
    "train.encode_batch_size": 64,
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason=f"not installed: {' or '.join(NEEDED)}",
    ),
]


@pytest.fixture
def server():
    """(process, environment of programs that take it for Google's)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = pathlib.Path(__file__).with_name("bucket_server.py")
    process = subprocess.Popen([sys.executable, str(script), str(port)], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(100):
        time.sleep(0.1)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address, "GCE_METADATA_ROOT": "127.0.0.1:1",
        "NO_GCE_CHECK": "true",
    }  # fmt: skip
    yield process, environment
    process.kill()


def train(environment, workdir, num_steps, *more):
    overrides = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "hyperlora_jax", "train", "--config", "configs/demo.py"),
            *("--workdir", workdir, f"--config.train.num_steps={num_steps}", *overrides, *more),
        ],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def hyperlora(environment, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "hyperlora_jax", *arguments],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(process):
    said = process.communicate(timeout=500)[0]
    assert process.returncode == 0, said[-2000:]
    return said


def exists(environment, path):
    return "yes" in python(environment, f"if epath.Path({path!r}).exists(): print('yes')")


def python(environment, code):
    done = subprocess.run(
        [sys.executable, "-c", f"from etils import epath\n{code}"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def read(environment, path):
    return python(environment, f"print(epath.Path({path!r}).read_text())")


def test_a_run_in_a_bucket_is_stopped_and_goes_on(server, tmp_path):
    _, environment = server
    environment["HYPERLORA_CACHE"] = str(tmp_path)
    process = train(environment, "gs://test/run", 60)
    for line in process.stdout:
        if "step/s" in line or "s/step" in line:
            break
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 75, said[-2000:]
    process = train(environment, "gs://test/run", 60)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-2000:]
    rows = read(environment, "gs://test/run/metrics.jsonl").splitlines()
    assert [line.split(",")[0] for line in rows if line] == [f'{{"step": {k}' for k in range(1, 61)]
    assert '"format": "hyperlora-hypernetwork"' in read(
        environment, "gs://test/run/hypernetwork/config.json"
    )
    assert not (ROOT / "gs:").exists()


def test_a_bucket_that_is_gone_stops_the_run_in_one_line(server, tmp_path):
    process, environment = server
    process.kill()
    environment["HYPERLORA_CACHE"] = str(tmp_path)
    run = train(environment, "gs://test/run", 10)
    said = run.communicate(timeout=550)[0]
    assert run.returncode == 2, said[-2000:]
    assert "--workdir gs://test/run: cannot write there (" in said.splitlines()[-1]


def test_a_dataset_in_a_bucket_is_copied_once_and_again_when_it_changes(server, tmp_path):
    _, environment = server
    environment["HYPERLORA_CACHE"] = str(tmp_path / "cache")
    folder = tmp_path / "targets"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "sub" / "b.bin").write_bytes(b"0123")
    code = f"""
from pathlib import Path
from hyperlora_jax import storage
with storage.writing("gs://test/data/targets", Path({str(tmp_path)!r})):
    pass
for _ in range(2):
    found = storage.fetched("gs://test/data/targets")
    print(found.name, (found / "a.json").read_text(), (found / "sub" / "b.bin").read_bytes())
from etils import epath
epath.Path("gs://test/data/targets/sub/b.bin").write_bytes(b"4567")
print((storage.fetched("gs://test/data/targets") / "sub" / "b.bin").read_bytes())
try:
    storage.fetched("gs://test/data/nothing")
except storage.UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[:2] == ["targets {} b'0123'"] * 2
    assert lines[2] == "b'4567'", "a file of the same size, but of another generation"
    assert lines[3].startswith("gs://test/data/nothing: no such folder or file")


def test_every_stage_works_in_a_bucket_and_goes_on_on_another_host(server, tmp_path):
    _, environment = server
    run = "gs://test/stages"
    more = {**SETTINGS, "distill.num_concepts": 8, "distill.num_slots": 2, "distill.num_steps": 50,
            "distill.save_every_steps": 25, "train.num_steps": 6, "evaluate.num_identities": 2,
            "evaluate.num_validation": 2, "evaluate.num_captions": 1, "evaluate.num_candidates": 2,
            "evaluate.num_sampling_steps": 2, "evaluate.methods": "('base','generated')",
            "evaluate.strengths": "(1.0,)"}  # fmt: skip
    config = ["--config", "configs/demo.py", *(f"--config.{k}={v}" for k, v in more.items())]
    environment["HYPERLORA_CACHE"] = str(tmp_path / "one")
    process = hyperlora(environment, "distill", "--workdir", run, *config)
    listed = f"p = epath.Path('{run}/spool'); print([*p.iterdir()] if p.exists() else [])"
    while process.poll() is None and ".safetensors" not in python(environment, listed):
        time.sleep(0.1)
    process.kill()
    assert not exists(environment, f"{run}/targets")
    environment["HYPERLORA_CACHE"] = str(
        tmp_path / "two"
    )  # nothing there but what is in the bucket
    said = finished(hyperlora(environment, "distill", "--workdir", run, *config))
    assert f"wrote {run}/targets" in said
    steps = re.findall(r"(\d+)/(\d+) \[", said)
    assert max(int(total) for done, total in steps if done != total) < 8 * 50
    finished(hyperlora(environment, "train", "--workdir", run, *config))
    said = finished(hyperlora(environment, "evaluate", "--workdir", run, *config))
    assert f"wrote {run}/report/index.html" in said
    assert "<html" in read(environment, f"{run}/report/index.html")
    said = finished(hyperlora(environment, "inspect", run))
    assert "checkpoints at steps" in said
    finished(hyperlora(environment, "export", run, "--out", str(tmp_path / "hyper")))
    assert (tmp_path / "hyper" / "model.safetensors").exists()
    flags = {"data.num_identities": 8, "data.num_views": 2, "train.num_steps": 2,
             "train.batch_size": 4, "export.path": "gs://test/encoder/result"}  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in flags.items()]
    encoder = ["--config", "configs/avatar_encoder.py", "--workdir", "gs://test/encoder", *flags]
    finished(hyperlora(environment, "pretrain", *encoder))
    assert exists(environment, "gs://test/encoder/result/config.json")
    assert not (ROOT / "gs:").exists()
