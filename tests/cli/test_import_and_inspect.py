import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.cli import directions, import_loras, inspect_dataset
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.editing import load_directions
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora_files import save_lora
from hyperlora_jax.targets.lora_targets import open_lora_targets

sys.path.insert(0, str(Path(__file__).parents[1] / "targets"))
import tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base.save(tmp_path_factory.mktemp("base") / "sd")


def call(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(list(map(str, arguments))))


def write_loras(folder, base, count, preset="attn-qkvo", rank=3):
    spec = base.lora_spec(preset, rank)
    for k in range(count):
        vector = np.random.default_rng(k).normal(size=spec.num_parameters).astype(np.float32)
        lora = vectorize.unflatten(vector, spec)
        metadata = {"base_hash": base.base_hash}
        save_lora(folder / f"{k}.safetensors", lora, spec, "kohya", family="sd1", metadata=metadata)
    return spec


def test_import_then_inspect(base, tmp_path, capsys):
    spec = write_loras(tmp_path / "in", base, 4)
    content = (tmp_path / "in/0.safetensors").read_bytes()
    (tmp_path / "in/0 copy.safetensors").write_bytes(content)
    (tmp_path / "in/bad.safetensors").write_bytes(content[:500])
    for k in range(4):
        Image.new("RGB", (20, 20), (40 * k, 9, 9)).save(tmp_path / f"in/{k}.png")
    options = ["--base", base.path, "--out", tmp_path / "out", "--workers", 1]
    assert call(import_loras, tmp_path / "in", *options) == 0
    printed = capsys.readouterr().out
    assert f"{len(spec)} sites, rank 3" in printed and "5 of 6 LoRAs imported" in printed
    open_lora_targets(tmp_path / "out", spec, base.base_hash)
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    assert call(inspect_dataset, tmp_path / "out", "--json", report, "--sheet", sheet) == 0
    printed = capsys.readouterr().out
    assert "duplicates     1" in printed and "(identical)" in printed
    assert json.loads(report.read_text())["measured"] == 5
    assert Image.open(sheet).size == (8 * 96, 96)


def test_matrix_needs_no_preset(base, tmp_path, capsys):
    spec = base.lora_spec("w2w", 1)
    np.save(tmp_path / "all_weights.npy", np.ones((3, spec.num_parameters), np.float32))
    (tmp_path / "who.csv").write_text("id,identity\n0,Anna\n1,Anna\n2,Bert\n")
    options = ["--base", base.path, "--out", tmp_path / "out", "--identities", tmp_path / "who.csv"]
    assert call(import_loras, tmp_path / "all_weights.npy", *options) == 0
    targets = open_lora_targets(tmp_path / "out", spec)
    assert sorted(targets.identities) == ["Anna", "Anna", "Bert"]


def test_directions_of_an_imported_dataset(base, tmp_path):
    spec = write_loras(tmp_path / "in", base, 6)
    options = ["--base", base.path, "--out", tmp_path / "out"]
    assert call(import_loras, tmp_path / "in", *options) == 0
    ids = open_lora_targets(tmp_path / "out").ids
    labels, file = tmp_path / "labels.json", tmp_path / "d.safetensors"
    arguments = (tmp_path / "out", "--labels", labels, "--out", file)
    for text, match in (
        (json.dumps({"hat": [*ids[:2], "nobody"]}), "hat lists nobody"),
        (json.dumps({"hat": ids}), "hat: 6 of 6 LoRAs show it"),
        ("[1]", "expected a JSON object of lists"),
    ):
        labels.write_text(text)
        with pytest.raises(UserError, match=match):
            call(directions, *arguments)
    assert not file.exists()
    labels.write_text(json.dumps({"hat": ids[:2], "red hair": ids[1:4]}))
    assert call(directions, *arguments) == 0
    assert set(load_directions(file, spec).vectors) == {"hat", "red hair"}


def test_wrong_use_is_one_line(base, tmp_path):
    def refuse(match, module, *arguments):
        with pytest.raises(UserError, match=match):
            call(module, *arguments)

    options = ["--base", base.path, "--out", tmp_path / "out"]
    write_loras(tmp_path / "in", base, 1)
    (tmp_path / "bad.safetensors").write_bytes(b"")
    refuse("--workers is 0", import_loras, tmp_path / "in", *options, "--workers", 0)
    refuse("rank is 0, expected at least 1", import_loras, tmp_path / "in", *options, "--rank", 0)
    refuse("none of 1 LoRAs", import_loras, tmp_path / "bad.safetensors", *options)
    refuse("preset 'huge' is unknown", import_loras, tmp_path / "in", *options, "--preset", "huge")
    refuse("not a directory", import_loras, tmp_path / "in", "--base", "no", "--out", "x")
    refuse("is no LoRA-target dataset", inspect_dataset, tmp_path)
    call(import_loras, tmp_path / "in", *options, "--workers", 1)
    refuse("--limit is 0", inspect_dataset, tmp_path / "out", "--limit", 0)
    refuse("has no pictures", inspect_dataset, tmp_path / "out", "--sheet", tmp_path / "s.png")
    refuse("cannot be written", inspect_dataset, tmp_path / "out", "--json", tmp_path / "no/r.json")
