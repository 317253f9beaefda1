"""Commands whose files lie in buckets: read and written there, or refused in one line."""

import json
import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image

from hyperlora_jax.cli.main import main, run_command
from hyperlora_jax.lora_files import load_lora, save_lora
from hyperlora_jax.stable_diffusion.embedded import base_path, load_base
from tests import user_world
from tests.bucket_memory import _bucket  # noqa: F401 - a fixture
from tests.lora_files.conftest import random_lora
from tests.lora_files.test_round_trip import deltas
from tests.test_generate import hypernetwork


@pytest.fixture(name="sd", scope="module")
def _sd():
    return load_base("tiny-sd")


@pytest.fixture(name="lora")
def _lora(bucket, sd, tmp_path, monkeypatch):
    """A LoRA for tiny-sd at gs://b/in/anna.safetensors; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    spec = sd.lora_spec("w2w", 1)
    save_lora("gs://b/in/anna.safetensors", random_lora(spec, 0), spec, family="sd1")
    assert list(bucket.store) == ["/b/in/anna.safetensors"]
    return "gs://b/in/anna.safetensors"


def run(*arguments):
    return run_command(str(arguments[0]), [str(item) for item in arguments[1:]])


@pytest.fixture(autouse=True)
def _nothing_beside(tmp_path):
    yield
    assert not list(tmp_path.rglob("gs:*")) and not list(tmp_path.rglob("s3:*"))


def fetched(address, place):
    epath.Path(address).copy(place, overwrite=True)
    return place


def test_lora_files_are_converted_merged_and_extracted_there(lora, bucket, tmp_path, capsys):
    assert run("convert", lora, "--out", "s3://b/out/anna", "--format", "peft") == 0
    assert "wrote 1 LoRA(s), e.g. s3://b/out/anna" in capsys.readouterr().out
    assert sorted(name for name in bucket.store if "/out/" in name) == [
        "/b/out/anna/adapter_config.json", "/b/out/anna/adapter_model.safetensors"
    ]  # fmt: skip
    out = "abfs://c/sum.safetensors"
    assert run("merge", f"{lora}=0.5", f"{lora}=0.25", "--rank", 1, "--base", "sd1",
               "--out", out) == 0  # fmt: skip
    assert "wrote abfs://c/sum.safetensors: " in capsys.readouterr().out.replace("az:", "abfs:")
    merged = deltas(*load_lora(fetched("az://c/sum.safetensors", tmp_path / "sum.safetensors")))
    single = deltas(*load_lora(fetched(lora, tmp_path / "one.safetensors")))
    for site, value in single.items():
        np.testing.assert_allclose(merged[site], 0.75 * value, atol=2e-2 * np.abs(value).max())

    base = base_path("tiny-sd")
    assert run("merge", lora, "--into", base, "--out", "gs://b/tuned") == 0
    assert "wrote gs://b/tuned" in capsys.readouterr().out
    assert run("extract", base, "gs://b/tuned", "--rank", 1, "--out", "gs://b/diff") == 0
    assert "wrote gs://b/diff" in capsys.readouterr().out
    assert [name for name in bucket.store if name.startswith("/b/diff")]


def test_pictures_are_drawn_there(lora, bucket, capsys):
    assert run("sample", "tiny-sd", "--prompt", "a", "http://b", "--num_steps", 1,
               "--lora", lora, "--out", "gs://b/drawn/today") == 0  # fmt: skip
    assert "wrote 2 pictures to gs://b/drawn/today" in capsys.readouterr().out
    drawn = [name for name in bucket.store if name.startswith("/b/drawn/today/")]
    assert len(drawn) == 3 and all(name.endswith(".png") for name in drawn)


def test_loras_are_generated_from_and_to_buckets(lora, bucket, tmp_path, capsys):
    hypernetwork("ridge").save("gs://b/run/hypernetwork")
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "a.png")
    epath.Path(tmp_path / "a.png").copy("gs://b/pictures/ben/a.png")
    assert run("generate", "--checkpoint", "gs://b/run", "--reference", "gs://b/pictures/ben/a.png",
               "--out", "gs://b/made/ben.safetensors") == 0  # fmt: skip
    assert "gs://b/made/ben.safetensors" in capsys.readouterr().out
    assert run("generate", "--checkpoint", "gs://b/run", "--subjects", "gs://b/pictures",
               "--out", "gs://b/many") == 0  # fmt: skip
    assert {"/b/made/ben.safetensors", "/b/many/ben.safetensors"} <= bucket.store.keys()
    assert run("inspect", "gs://b/run/hypernetwork") == 0
    assert run("inspect", "gs://b/made/ben.safetensors", "--json", "gs://b/made/ben.json") == 0
    assert json.loads(epath.Path("gs://b/made/ben.json").read_text())


def test_a_dataset_is_imported_and_looked_at_there(lora, bucket, capsys):
    base = base_path("tiny-sd")
    arguments = ("import", "gs://b/in", "--base", base, "--out", "gs://b/targets", "--workers", 1)
    assert run(*arguments) == 0
    assert "1 of 1 LoRAs imported to gs://b/targets" in capsys.readouterr().out
    assert run("inspect", "gs://b/targets", "--json", "gs://b/seen.json") == 0
    assert "/b/seen.json" in bucket.store
    assert run(*arguments) == 2
    assert "gs://b/targets: exists, expected a new dataset folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lora_is_refined_there(lora, bucket, tmp_path, capsys):
    people = user_world.write_people(tmp_path / "people", {"anna": (2, (16, 16))})
    for file in (people / "anna").iterdir():
        epath.Path(file).copy(f"gs://b/people/anna/{file.name}")
    shutil.rmtree(people)
    assert run("refine", lora, "--images", "gs://b/people/anna", "--base", "tiny-sd",
               "--num_steps", 1, "--rank", 1,
               "--out", "gs://b/refined.safetensors") == 0  # fmt: skip
    assert "wrote gs://b/refined.safetensors" in capsys.readouterr().out
    assert "/b/refined.safetensors" in bucket.store


COMMANDS = (
    ("inspect", "{}"),
    ("generate", "--checkpoint", "{}", "--reference", "a.png", "--out", "a.safetensors"),
    ("generate", "--checkpoint", "run", "--reference", "a.png", "--out", "{}"),
    ("export", "{}", "--out", "out"),
    ("export", "run", "--out", "{}"),
    ("convert", "a.safetensors", "--out", "{}", "--format", "peft"),
    ("merge", "a.safetensors=1", "--out", "{}"),
    ("merge", "{}=0.5", "--out", "b.safetensors"),
    ("extract", "a", "b", "--out", "{}"),
    ("sample", "{}", "--prompt", "a", "--out", "o"),
    ("sample", "tiny-sd", "--prompt", "a", "--out", "{}"),
    ("refine", "a.safetensors", "--images", "a", "--base", "tiny-sd", "--out", "{}"),
    ("import", "a", "--base", "b", "--out", "{}"),
    ("train", "--config", "configs/avatars.py", "--workdir", "{}"),
    ("distill", "--config", "configs/avatars.py", "--workdir", "w", "--config.data.source={}"),
    ("evaluate", "--workdir", "w", "--json", "{}"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda given: " ".join(given[:3]))
@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("gs://b/x", "pip install 'hyperlora-jax[gcs]'"),
        ("s3://b/x", "pip install 'hyperlora-jax[s3]'"),
        ("abfs://b/x", "pip install 'hyperlora-jax[azure]'"),
        ("ftp://b/x", "expected gs://, s3://, az://, abfs://"),
    ],
)
def test_what_cannot_be_reached_is_one_line(command, address, named, capsys, monkeypatch):
    def missing(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    arguments = [item.format(address) for item in command]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hyperlora {command[0]}: {address}: ") and line.endswith(named)


@pytest.mark.parametrize("command", COMMANDS[:2], ids=lambda given: " ".join(given[:3]))
def test_a_bucket_that_does_not_answer_is_one_line(command, bucket, capsys, monkeypatch):
    def lost(self, path, **_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(bucket, "info", lost)
    monkeypatch.setattr(bucket, "exists", lost)
    assert run_command(command[0], [item.format("gs://b/x") for item in command[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"hyperlora {command[0]}: gs://b/x: cannot be reached (no route to host)"


def test_compile_and_demo_write_to_disks_only(bucket, capsys):
    assert run("compile", "--config", "configs/avatars.py", "--topology", "v5e-4",
               "--json", "gs://b/x.json") == 2  # fmt: skip
    assert "`hyperlora compile` works in a local folder only" in capsys.readouterr().err
    assert run("demo", "--workdir", "gs://b/demo") == 2
    assert "`hyperlora demo` works in a local folder only" in capsys.readouterr().err
