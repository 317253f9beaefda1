import json
import types

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import Image
from safetensors.numpy import save_file

from hyperlora_jax import model_card
from hyperlora_jax.cli.main import main

FACTS = {
    "base": "tiny-sd",
    "base_hash": "b" * 64,
    "family": "sd1",
    "num_steps": 700,
    "trained_on": ["a", "b", "c"],
    "data": {"source": "/home/me/pictures/people"},
}


def test_the_card_of_a_hypernetwork_says_what_it_is_and_what_was_measured(tmp_path):
    (tmp_path / "report").mkdir()
    scores = {"identity_top1": {"generated": {"mean": 0.84}, "base": {"mean": 0.039}}}
    (tmp_path / "report" / "metrics.json").write_text(json.dumps(scores))
    text = model_card.of_hypernetwork(FACTS, {"generator": "regression"}, str(tmp_path))
    card = ModelCard(text)  # as the hub reads it
    assert card.data.base_model == "tiny-sd"
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "hyperlora_jax")
    assert "| subjects trained on | 3 |" in text
    assert "| their pictures | people |" in text and "/home/me" not in text
    assert "| generated | 0.84 | – | – |" in text
    assert "consent" in text
    bare = model_card.of_hypernetwork(FACTS, {}, str(tmp_path / "elsewhere" / "x"))
    assert "Nothing yet" in bare


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: creativeml-openrail-m\n---\n# x"}, "creativeml-openrail-m"),
        ({"README.md": "# no metadata", "LICENSE": "\n MIT License\n\nx"}, "MIT License"),
        ({}, "unknown"),
    ],
)
def test_the_licence_of_a_base_is_the_one_that_was_found(tmp_path, files, licence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert model_card.found_base(str(tmp_path)) == (tmp_path.name, licence)
    card = ModelCard(model_card.of_loras({**FACTS, "base": str(tmp_path)}, ["a"], 1.5, "kohya"))
    expected = {"MIT License": "other", "unknown": None}.get(licence, licence)
    assert card.data.license == expected
    assert f"| licence of the base | {licence} |" in card.content


def test_a_card_of_another_hand_stays(tmp_path):
    model_card.write(tmp_path, model_card.of_loras(FACTS, ["a.safetensors"], 1.5, "kohya"))
    model_card.write(tmp_path, model_card.of_loras(FACTS, ["b.safetensors"], 1.5, "kohya"))
    assert "b.safetensors" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine")
    model_card.write(tmp_path, model_card.of_loras(FACTS, ["a.safetensors"], 1.5, "kohya"))
    assert (tmp_path / "README.md").read_text() == "# Mine"


@pytest.fixture(name="folder")
def _folder(tmp_path):
    folder = tmp_path / "loras"
    (folder / ".cache").mkdir(parents=True)
    save_file({"a": np.zeros(4, np.float32)}, folder / "anna.safetensors")
    (folder / ".cache" / "x.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(folder / "anna.png")
    model_card.write(folder, model_card.of_loras(FACTS, ["anna.safetensors"], 1.5, "kohya"))
    return folder


@pytest.fixture(name="hub")
def _hub(monkeypatch):
    """The hub's client, of which no call leaves the process."""
    calls = []

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        calls.append(("upload", repo_id, sorted(allow_patterns)))
        return types.SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def test_push_is_a_dry_run_unless_told_otherwise(folder, hub, capsys):
    assert main(["push", str(folder), "me/loras"]) == 0
    said = capsys.readouterr().out
    assert "anna.safetensors" in said and "README.md" in said
    assert "anna.png" not in said and "2 other files stay here" in said
    assert "dry run: 2 files would go to me/loras; --upload sends them" in said
    assert hub == []


def test_push_sends_weights_and_card_and_no_pictures(folder, hub, capsys):
    assert main(["push", str(folder), "me/loras", "--upload", "--private"]) == 0
    assert hub == [
        ("create", "me/loras", True, True),
        ("upload", "me/loras", ["README.md", "anna.safetensors"]),
    ]
    assert "wrote https://hub/commit/1" in capsys.readouterr().out


def test_push_says_what_is_missing(folder, hub, monkeypatch, capsys):
    def refused(arguments, text):
        assert main(["push", *map(str, arguments)]) == 2
        assert text in capsys.readouterr().err

    refused((folder, "loras"), "REPO loras: expected OWNER/NAME")
    refused((folder / "no", "me/loras"), "does not exist, expected a folder")

    def no_login(self, *args, **options):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "create_repo", no_login)
    refused((folder, "me/loras", "--upload"), "run `hf auth login`")
    (folder / "README.md").unlink()
    refused((folder, "me/loras"), "has no README.md, expected the card")
    (folder / "anna.safetensors").unlink()
    refused((folder, "me/loras"), "holds no weights")
